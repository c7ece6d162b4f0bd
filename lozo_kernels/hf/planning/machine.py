"""How fast a machine is: measured here, or worked out from a memory bandwidth that is given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import nn

from ...model.probe.choosing.cost import Costs, fastest, measure_costs
from ...optim.optimizer import ZerothOrderOptimizer

_PASSES = 2  # over the weights in a fused step in place, each reads and writes them
_LAUNCH = 1e-5  # seconds of a small kernel's launch, where nothing is measured
_SIDE = 4096  # of the matrices that are measured
_TOKENS = 128
_FIRST_SIDE = 256
_LONG = 0.05  # seconds of a call that is long enough to measure; a product in fp16 takes minutes on many CPUs


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds for weights of one dtype.

    Attributes:
        source: where the numbers are from.
        bandwidth: bytes per second that a pass over memory reads and writes together.
        flops: floating-point operations per second of a large matrix product; None if unknown.
        passes: seconds per weight of what a step in place does beyond its forward passes.
        costs: what the two sides of a probe cost.
    """

    source: str
    bandwidth: float
    flops: float | None
    passes: float
    costs: Costs

    def forward_seconds(self, flops: int, nbytes: int) -> float:
        """Seconds of a forward pass, which waits for its operations or for reading the weights, whichever takes longer."""
        return max(nbytes / self.bandwidth, flops / self.flops if self.flops else 0.0)


def given_machine(bandwidth: float, flops: float | None, dtype: torch.dtype) -> Machine:
    """A machine that does everything at the speed of memory; bytes and floating-point operations per second."""
    size = dtype.itemsize
    # The activation side reads x, reads and writes y: 1.5 times each feature of a layer with as many outputs as inputs.
    costs = Costs(call=_LAUNCH, feature=1.5 * size / bandwidth, fill=_LAUNCH, element=2 * size / bandwidth)
    return Machine(f"a bandwidth of {bandwidth / 1e9:g} GB/s", bandwidth, flops, _PASSES * 2 * size / bandwidth, costs)


def measured_machine(
    device: torch.device, dtype: torch.dtype, rank: int, make_optimizer: Callable[[nn.Module], ZerothOrderOptimizer] | None
) -> Machine:
    """Measures this machine for about a second. The fastest of a few calls counts, since other load only ever adds.

    Args:
        make_optimizer: makes an optimiser that moves the weights of a model in place; None: there is none to measure.
    """
    with torch.no_grad():
        x = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        bandwidth = 2 * x.nbytes / fastest(lambda: x.mul_(1.0), device)

        def product(side: int) -> float:
            inputs = torch.ones(_TOKENS, side, dtype=dtype, device=device)
            return fastest(lambda: inputs @ x[:side, :side], device)

        side, seconds = _long_enough(product)
        flops, passes = 2 * _TOKENS * side**2 / seconds, 0.0
        if make_optimizer is not None:
            side, seconds = _long_enough(functools.partial(_step_seconds, make_optimizer, x))
            passes = seconds / side**2
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return Machine(f"measured here ({where})", bandwidth, flops, passes, measure_costs(device, dtype, rank, None))


def _step_seconds(make_optimizer: Callable[[nn.Module], ZerothOrderOptimizer], x: torch.Tensor, side: int) -> float:
    """Seconds of a step in place on a square weight of so many rows, whose values are in x."""
    model = nn.Module()
    model.weight = nn.Parameter(x[:side, :side].clone())
    optimizer, loss = make_optimizer(model), torch.zeros((), device=x.device, dtype=torch.float32)
    seconds = fastest(lambda: optimizer.step(lambda: loss), x.device)
    optimizer.handle.restore()
    return seconds


def _long_enough(seconds_of: Callable[[int], float]) -> tuple[int, float]:
    """The side of a square matrix that takes long enough to measure, and its seconds: a large one may take minutes."""
    side = _FIRST_SIDE
    while True:
        seconds = seconds_of(side)
        if seconds > _LONG or side == _SIDE:
            return side, seconds
        side *= 2
