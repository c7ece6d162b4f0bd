"""The machines that kernels are compiled for, and the figures that the roofline is predicted from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        arch: as Triton names it.
        device: whose figures these are.
        reported: the bandwidth is that of a copy on a real machine, as others measured it; otherwise a share of the published one.
        bandwidth: bytes read and written by a copy, per second.
        clocks: clocks of a multiprocessor for one unit of a pipe's work: a warp's instruction; of "issue", any instruction.
        shared_bytes, global_bytes, multiply_adds: per clock and multiprocessor.
    """

    name: str
    vendor: str
    arch: int | str
    device: str
    reported: bool
    bandwidth: float
    multiprocessors: int
    hertz: float
    clocks: dict[str, float]
    shared_bytes: float
    global_bytes: float
    multiply_adds: float

    @property
    def lanes(self) -> int:
        """The threads that an instruction works for."""
        return 32 if self.vendor == "nvidia" else 64


# Four schedulers issue one instruction a clock each. 64 lanes multiply fp32 or integers ("heavy" in NVIDIA's profiler) and 64 more
# only fp32 ("lite"; sm_80 has none). A wide product takes twice as long: an assumption, NVIDIA publishes the rate of 32-bit
# products only. 64 lanes for logic, shifts, comparisons and packing; 16 for special functions.
_NVIDIA = {"issue": 0.25, "heavy": 0.5, "wide": 1.0, "lite": 0.5, "alu": 0.5, "special": 2.0}
# A wave of 64 takes four clocks of one of four SIMDs; integer products and special functions four times that.
_CDNA = {"issue": 0.25, "alu": 1.0, "quarter": 4.0}

TARGETS = {
    target.name: target
    for target in (
        Target(
            *("sm_80", "nvidia", 80, "A100 80GB", False, 0.9 * 2.0e12, 108, 1.41e9),
            clocks={k: v for k, v in _NVIDIA.items() if k != "lite"},
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,
        ),
        Target(
            *("sm_90", "nvidia", 90, "H200", True, 4.3e12, 132, 1.755e9),
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,  # half of it for mma, all of it for wgmma: neither comes close to being a bound
        ),
        Target(
            *("sm_100", "nvidia", 100, "B200", False, 0.9 * 8.0e12, 148, 1.85e9),
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,
        ),
        Target(
            *("sm_120", "nvidia", 120, "RTX 5090", False, 0.9 * 1.79e12, 170, 2.4e9),
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=512,
        ),
        Target(
            *("gfx942", "amd", "gfx942", "MI300X", False, 0.85 * 5.3e12, 304, 2.1e9),
            clocks=_CDNA,
            shared_bytes=128,
            global_bytes=64,
            multiply_adds=1024,
        ),
    )
}
