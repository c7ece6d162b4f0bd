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
        threads, programs, registers, shared_memory: the most that a multiprocessor holds at once; shared_memory in bytes.
        shared_reserved: bytes of it that every program takes besides its own.
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
    threads: int = 2048
    programs: int = 32
    registers: int = 65536
    shared_memory: int = 228 << 10
    shared_reserved: int = 1024

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
            name="sm_80",
            vendor="nvidia",
            arch=80,
            device="A100 80GB",
            reported=False,
            bandwidth=0.9 * 2.0e12,
            multiprocessors=108,
            hertz=1.41e9,
            clocks={k: v for k, v in _NVIDIA.items() if k != "lite"},
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,
            shared_memory=164 << 10,
        ),
        Target(
            name="sm_90",
            vendor="nvidia",
            arch=90,
            device="H200",
            reported=True,
            bandwidth=4.3e12,
            multiprocessors=132,
            hertz=1.755e9,
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,  # half of it for mma, all of it for wgmma: neither comes close to being a bound
        ),
        Target(
            name="sm_100",
            vendor="nvidia",
            arch=100,
            device="B200",
            reported=False,
            bandwidth=0.9 * 8.0e12,
            multiprocessors=148,
            hertz=1.85e9,
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=1024,
        ),
        Target(
            name="sm_120",
            vendor="nvidia",
            arch=120,
            device="RTX 5090",
            reported=False,
            bandwidth=0.9 * 1.79e12,
            multiprocessors=170,
            hertz=2.4e9,
            clocks=_NVIDIA,
            shared_bytes=128,
            global_bytes=128,
            multiply_adds=512,
            threads=1536,
            programs=24,
            shared_memory=100 << 10,
        ),
        Target(
            name="gfx942",
            vendor="amd",
            arch="gfx942",
            device="MI300X",
            reported=False,
            bandwidth=0.85 * 5.3e12,
            multiprocessors=304,
            hertz=2.1e9,
            clocks=_CDNA,
            shared_bytes=128,
            global_bytes=64,
            multiply_adds=1024,
            registers=4 * 512 * 64,  # a SIMD has 512 of a wave's 64 lanes
            shared_memory=64 << 10,
            shared_reserved=0,
        ),
    )
}
