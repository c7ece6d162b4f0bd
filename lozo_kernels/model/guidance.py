"""Where AGZO's V comes from: the inputs of layers in unperturbed forward passes, before the first evaluation of a window."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.registry import choose_backend
from .conditions import eagerly
from .estimators.directions import FactorSpec
from .estimators.guided import Guided, as_factor, orthonormal_basis, power_step
from .parameters import Parameter
from .report import ParameterReport
from .storage import layer_kind

FIRST_LOOKS = 3
"""Forward passes, each a power step, for the first V of a run, which starts from noise. Every later V starts from the last one."""
_ROWS = 4096  # rows of inputs that are converted to fp32 at once

Together = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Takes this process's numbers, (n,) fp64, and what makes an answer, (n,) fp64, from those of all processes, (processes, n).
Returns the answer, whose bits are the same on all."""

_WHY_NOT = {
    "embedding": "an embedding looks rows up and has no inputs",
    "transposed": "Conv1D has its inputs in the rows of the weight",
    "linear": "it is seen as another matrix than that of its layer (square=)",
    None: "it is not the weight of a linear layer",
}
_UNSEEN = "no finite inputs reached its layer in the forward passes that V is made from"


def in_one_process(numbers: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """:data:`Together` for one process."""
    return answer(numbers[None])


class Guidance:
    """Makes the V of each window from the inputs of linear layers, one power step a forward pass: A <- qr(H^T (H A)).

    Weights without such inputs keep the V of LOZO. So do those whose layer did not run when the first V was made; a layer that ran
    once and does not run for a later V keeps the one that it has.

    Attributes:
        reasons: by name of a low-rank parameter, why it keeps the V of LOZO.

    Raises:
        ValueError: no weight can be guided.
    """

    def __init__(self, trained: Sequence[Parameter], estimator: Guided) -> None:
        self._estimator = estimator
        self._guided: list[tuple[Parameter, list[int]]] = []  # with the places of its linear layers among its owners
        self.reasons: dict[str, str] = {}
        self._warned = False
        for p in trained:
            if p.low_rank:
                kinds = [layer_kind(owner) for owner in p.storage.owners]
                linear = [i for i, kind in enumerate(kinds) if kind == "linear" and p.layout.form == "matrix"]
                if linear:
                    self._guided.append((p, linear))
                else:
                    self.reasons[p.name] = _WHY_NOT[kinds[0]]
        if not self._guided:
            raise ValueError(
                "AGZO makes V from the inputs of linear layers (torch.nn.Linear), and no trained parameter is the weight of one"
                + (f" ({'; '.join(self.notes)})" if self.reasons else "")
                + ": use LOZO"
            )

    @property
    def window(self) -> int | None:
        """The window of the V in memory."""
        return self._estimator.window

    @property
    def vs(self) -> dict[str, Tensor]:
        """The V of that window by name, transposed, (rank, columns) fp16 on the CPU."""
        vs = self._estimator.vs
        return {p.name: vs[p.tensor_id][0] for p, _ in self._guided if p.tensor_id in vs}

    @property
    def notes(self) -> tuple[str, ...]:
        """Which parameters keep the V of LOZO, a line for each reason."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(name)
        return tuple(f"not guided by inputs, with the V of LOZO: {', '.join(names)} ({why})" for why, names in by_reason.items())

    def describe(self, row: ParameterReport) -> ParameterReport:
        """The row of a report, with the reason if it keeps the V of LOZO."""
        why = self.reasons.get(row.name)
        return row if why is None else dataclasses.replace(row, note=f"{row.note}; V of LOZO: {why}")

    def look(self, forward: Callable[[], object], window: int, together: Together) -> dict[str, Tensor]:
        """Makes V from the inputs in ``forward()``, which is called once, or :data:`FIRST_LOOKS` times for the first V.

        Returns:
            As :attr:`vs`, which does not change.

        Raises:
            ValueError: no layer was given finite inputs.
        """
        found = self.vs
        with contextlib.ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code calls no hook that it does not know
                stack.enter_context(eagerly())
            for _ in range(FIRST_LOOKS if self.window is None else 1):
                found |= self._step(forward, window, found, together)
        if not found:
            raise ValueError(
                f"none of the {len(self._guided)} linear layers that are trained (e.g. that of {self._guided[0][0].name!r}) was "
                "given finite inputs by the closure: let it call the model that was patched, and its layers as modules; or use LOZO"
            )
        for p, _ in self._guided:
            self.reasons.pop(p.name, None)
            if p.name not in found:
                self.reasons[p.name] = _UNSEEN
        if self.reasons and not self._warned:
            self._warned = True
            warnings.warn("\n".join(self.notes), stacklevel=2)
        return found

    def check(self, vs: Mapping[str, Tensor]) -> None:
        """Raises ValueError if a V is of no weight that can be guided, or does not fit it."""
        known = {p.name: p for p, _ in self._guided}
        for name, v in vs.items():
            shape = (self._estimator.config.rank, known[name].extent[2]) if name in known else None
            if shape is None or v.shape != shape or v.dtype != torch.float16:
                raise ValueError(f"the V of {name!r}, {tuple(v.shape)} {v.dtype}, is not that of a linear layer of this model")
            if not bool((v.abs() < 128).all()):  # not a number is not below either
                raise ValueError(f"the V of {name!r} has a value that no V has")

    def take(self, window: int | None, vs: Mapping[str, Tensor]) -> None:
        """Makes these, as :meth:`look` returns them, the V of a window; None: the next V is the first of a run. Raises as
        :meth:`check`; nothing was changed then."""
        self.check(vs)
        ids = {p.name: p.tensor_id for p, _ in self._guided}
        self._estimator.vs = {ids[name]: v.to("cpu", copy=True).unsqueeze(0) for name, v in vs.items()}
        self._estimator.window = window

    def _step(self, forward: Callable[[], object], window: int, vs: Mapping[str, Tensor], together: Together) -> dict[str, Tensor]:
        """One forward pass and one power step for each weight whose layers were given finite inputs."""
        sums = [_Product(orthonormal_basis(vs[p.name] if p.name in vs else self._noise(p, window))) for p, _ in self._guided]
        with contextlib.ExitStack() as hooks:
            for (p, layers), total in zip(self._guided, sums, strict=True):
                for i in layers:
                    handle = p.storage.owners[i].module.register_forward_pre_hook(total.see, with_kwargs=True)
                    hooks.callback(handle.remove)
            forward()

        def answer(numbers: Tensor) -> Tensor:
            whole = numbers[0].clone()
            for row in numbers[1:]:
                whole += row
            return torch.cat([total.answer(part) for total, part in zip(sums, whole.split(sizes), strict=True)])

        sizes = [1 + total.a.numel() for total in sums]
        answers = together(torch.cat([total.numbers for total in sums]), answer).split(sizes)
        found = {}
        for (p, _), total, part in zip(self._guided, sums, answers, strict=True):
            if part[0]:
                v = torch.zeros(self._estimator.config.rank, total.a.shape[0], dtype=torch.float16, device="cpu")
                v[: total.a.shape[1]] = part[1:].view(total.a.shape[1], -1)
                found[p.name] = v
        return found

    def _noise(self, p: Parameter, window: int) -> Tensor:
        cpu = torch.device("cpu")
        return self._estimator.unguided(FactorSpec(p.tensor_id, p.extent, choose_backend(cpu).backend, cpu), window)[0]


class _Product:
    """H^T (H A) of a layer, summed over the rows of all its inputs, which are not kept.

    Attributes:
        a: A, (columns, k) fp64 on the CPU.
    """

    def __init__(self, a: Tensor) -> None:
        self.a = a
        self._rows = 0
        self._sum: Tensor | None = None
        self._there: Tensor | None = None  # A in fp32, where the inputs are

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002  (a forward pre-hook)
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for part in x.unbind() if x.is_nested else (x,):
                self._add(part.detach().reshape(-1, part.shape[-1]))

    def _add(self, rows: Tensor) -> None:
        if self._there is None or self._there.device != rows.device:
            self._there = self.a.to(rows.device, torch.float32)
            self._sum = torch.zeros_like(self._there) if self._sum is None else self._sum.to(rows.device)
        assert self._sum is not None
        self._rows += len(rows)
        for part in rows.split(_ROWS):
            h = part.float()
            self._sum += h.T @ (h @ self._there)

    @property
    def numbers(self) -> Tensor:
        """How many rows there were, and the sum, as fp64 on the CPU."""
        product = torch.zeros_like(self.a) if self._sum is None else self._sum.to("cpu", torch.float64)
        return torch.cat((torch.tensor([self._rows], dtype=torch.float64, device="cpu"), product.flatten()))

    def answer(self, numbers: Tensor) -> Tensor:
        """Whether there is a new V, and the V."""
        if not numbers[0] or not bool(numbers.isfinite().all()):
            return torch.zeros_like(numbers)
        v = as_factor(power_step(self.a, numbers[1:].view(self.a.shape))).double().flatten()
        return torch.cat((torch.ones(1, dtype=torch.float64, device="cpu"), v))
