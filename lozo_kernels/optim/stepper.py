"""From the losses of a step to its estimate of the gradient, and to the update that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.calls import Step
from .parallel import Parallel
from .state import ResumableOptimizer
from .steps import Pending, StepInfo


class EstimatingOptimizer(ResumableOptimizer):
    """The arithmetic of :class:`~lozo_kernels.optim.optimizer.ZerothOrderOptimizer`, which waits for no value on a device."""

    parallel: Parallel | None

    @property
    def _noise_step(self) -> Step:
        """The step as the passes over the weights get it."""
        return self._step if self._inputs is None else self._inputs.step

    def _estimate(self, plus: list[Tensor], minus: list[Tensor]) -> tuple[Pending, StepInfo]:
        """The update that the evaluations ask for. Reads no value: a skipped update is an update by zero, so nothing waits."""
        f_plus, f_minus = self._losses(plus, minus)
        return self._conclude(self._differences(f_plus, f_minus), f_plus, f_minus)

    def _losses(self, plus: list[Tensor], minus: list[Tensor]) -> tuple[Tensor, Tensor]:
        """F(+) and F(-) of all directions, of which other processes may have evaluated parts: (directions,) each."""
        if self.parallel is None:
            return torch.stack(plus), torch.stack(minus)
        return self.parallel.combine(self._step, plus, minus, self.directions)

    def _differences(self, plus: Tensor, minus: Tensor) -> Tensor:
        # By a tensor: a GPU divides by a number as a multiplication by its reciprocal, which rounds differently.
        distance = torch.full((), 2 * self.eps if self.two_sided else self.eps, dtype=torch.float64, device=plus.device)
        return (plus - minus) / distance

    def _mean(self, plus: Tensor, minus: Tensor) -> Tensor:
        return (plus + minus).mean() / 2 if self.two_sided else minus[0]

    def _conclude(self, c: Tensor, f_plus: Tensor, f_minus: Tensor) -> tuple[Pending, StepInfo]:
        good = torch.isfinite(c).all()
        c = torch.where(good, c, 0.0)
        lr = self._per_parameter("lr", c.device)
        pending = Pending(
            self._noise_step,
            list(c),
            lr=torch.where(good, lr, 0.0),
            weight_decay=self._per_parameter("weight_decay", c.device) if self._decays else 0.0,
            beta=torch.where(good, self.momentum, 1.0).to(torch.float64) if self.momentum else None,
        )
        loss = self._mean(f_plus, f_minus)
        total = self._skipped_total.to(c.device, non_blocking=True) + ~good
        in_a_row = (self._skipped_in_a_row.to(c.device, non_blocking=True) + 1) * ~good
        return pending, StepInfo(self._step, loss, f_plus, f_minus, c, ~good, total, in_a_row)
