"""Moves the parameters of a trainer's list, with one call of an op for each pass, wherever their storage is now."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.calls import Draw, Rounding
from ..kernels.checks import check_range, check_scale
from ..model.config import PatchConfig
from ..model.estimators import Estimator
from ..model.handle import Handle
from ..model.modules import own_parameters
from ..model.parameters import canonical
from ..model.passes import Carried, Scalar, Term

Pairs = Sequence[tuple[Any, ...]]
"""(name, parameter, ...) for each parameter, as in a trainer's ``named_parameters_to_optim``."""


@dataclasses.dataclass
class Listed:
    """A list of parameters that was seen before: the module that holds them for the handle, and the handle."""

    holder: nn.Module
    handle: Handle
    raw: dict[str, str]
    """The trainer's name for each of the handle's names."""


class Weights:
    """Moves lists of parameters along directions that a seed names.

    These trainers make their list anew in every step and may replace the storage of a parameter at any time. A list is recognised
    by its names; addresses are compared at every pass (:class:`~lozo_kernels.Handle` does it), so a list that did not change
    costs a look-up. Tied parameters are one. Noise is that of :mod:`lozo_kernels.kernels.noise` with the caller's seed and step 0;
    V is that of ``config.seed`` and the window of the caller's step.

    Args:
        config: estimator, rank, interval, seed of V, scaling, rounding and backend.
        model: gives further names of tied parameters, so that their ids are those of ``patch(model)``.
        make_estimator: makes the estimator of each list; None: as the config says.
    """

    def __init__(
        self,
        config: PatchConfig,
        model: nn.Module | None = None,
        make_estimator: Callable[[PatchConfig], Estimator] | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self._make_estimator = make_estimator
        self._lists: dict[tuple[str, ...], Listed] = {}
        self._whole: Listed | None = None
        self._tick = 0

    def listed(self, pairs: Pairs | None, step: int | None = None) -> Listed:
        """Returns the list with the storage that its parameters have now.

        Args:
            pairs: None for the parameters of the model that require a gradient.
            step: its window, ``step // interval``, says which V; None if the direction has none.

        Raises:
            TypeError, ValueError: a parameter cannot be changed in place, or there is none; nothing was changed.
        """
        found = self._find(pairs)
        self._tick ^= 1  # a step that differs from the last, so that the handle compares sizes and dtypes too
        found.handle.enter_window(self._tick if step is None else step)
        return found

    def _find(self, pairs: Pairs | None) -> Listed:
        if pairs is None:
            if self._whole is None:
                assert self.model is not None
                handle = Handle(self.model, self.config)
                self._whole = Listed(self.model, handle, {name: name for name in handle.names})
            return self._whole
        names = tuple(pair[0] for pair in pairs)
        found = self._lists.get(names)
        if found is None:
            found = self._lists[names] = self._make(pairs)
        else:
            owned = own_parameters(found.holder)
            for name, p, *_ in pairs:
                if owned[name] is not p:
                    owned[name] = trained(p)
        return found

    def perturb(self, pairs: Pairs | None, seed: int, scale: float, *, step: int | None = None) -> None:
        """X += scale * D(seed)."""
        check_scale(scale)
        term = Term(Draw(0), perturb=scale)
        for group in self.listed(pairs, step).handle.groups:
            group.apply([term], seed=_checked(seed))

    def update(
        self,
        pairs: Pairs | None,
        seed: int,
        gradient: Scalar,
        *,
        decay: Scalar | None = None,
        restore: float = 0.0,
        step: int | None = None,
        index: int = 0,
    ) -> None:
        """X <- decay * (X + restore * D(seed)) + gradient * D(seed).

        Args:
            gradient: -lr * c; a number, or one value per parameter of the list.
            decay: 1 - lr * weight_decay; a number, or one value per parameter; None for 1.
            restore: minus the scale of a perturbation along the same direction that is still applied.
            index: of this pass among the stochastically rounded ones of the seed.
        """
        term, rounding = Term(Draw(0), perturb=restore, gradient=gradient), self._rounding(index)
        for group in self.listed(pairs, step).handle.groups:
            group.apply([term], decay=decay, decayed=decay, rounding=rounding, seed=_checked(seed))

    def update_momentum(
        self,
        pairs: Pairs,
        seed: int,
        coefficient: Scalar,
        *,
        beta: float,
        lr: Scalar,
        decay: Scalar | None = None,
        restore: float = 0.0,
        step: int | None = None,
        index: int = 0,
    ) -> None:
        """N <- beta * N + coefficient * U, or Z for dense tensors; X <- decay * (X + restore * D(seed)) - lr * N V^T, or N."""
        handle = self.listed(pairs, step).handle
        handle.enable_momentum()
        term, carried = Term(Draw(0), perturb=restore, coefficient=coefficient), Carried(beta, -lr)
        for group in handle.groups:
            group.apply(
                [term],
                decay=decay,
                decayed=decay,
                carried=carried,
                rounding=self._rounding(index),
                seed=_checked(seed),
            )

    def factors(self, pairs: Pairs, step: int | None = None) -> dict[str, Tensor]:
        """V of every low-rank parameter by the trainer's name: (cols, rank) fp16 views, or (batch, cols, rank)."""
        listed = self.listed(pairs, step)
        found = {}
        for group in listed.handle.groups:
            for i, v in zip(group.index.tolist(), group.table.v or (), strict=False):
                v = v.transpose(1, 2)
                found[listed.raw[listed.handle.names[i]]] = v[0] if len(v) == 1 else v
        return found

    def momentum(self, pairs: Pairs, step: int | None = None) -> dict[str, Tensor]:
        """N by the trainer's name, empty before the first update with momentum.

        fp32 views: (rows, rank), (batch, rows, rank) for a batch of matrices, the parameter's own shape for dense ones.
        """
        listed = self.listed(pairs, step)
        handle = listed.handle
        shapes = dict(zip(handle.names, (p.shape for p in handle.parameters), strict=True))
        found = {}
        for name, n in handle.momentum.items():
            low_rank = self.config.estimator == "lowrank" and len(shapes[name]) >= 2
            found[listed.raw[name]] = (n[0] if len(n) == 1 else n) if low_rank else n.view(shapes[name])
        return found

    def _make(self, pairs: Pairs) -> Listed:
        holder, further = nn.Module(), []
        owned = own_parameters(holder)
        parameters = {id(p): trained(p) for _, p, *_ in pairs}
        for name, p, *_ in pairs:
            owned[name] = parameters[id(p)]
        for name, p in further_names(pairs, self.model):
            owned[name] = p
            further.append(name)
        handle = Handle(holder, self.config, None if self._make_estimator is None else self._make_estimator(self.config))
        for name in further:  # only the ids needed them; kept, they would keep replaced parameters in memory
            del owned[name]
        return Listed(holder, handle, {canonical(name): name for name, *_ in reversed(pairs)})

    def _rounding(self, index: int) -> Rounding | None:
        return Rounding(0, index) if self.config.rounding == "stochastic" else None


def _checked(seed: Any) -> int:
    """Returns a seed of any integer type as an ``int`` for the noise."""
    number = operator.index(seed)
    check_range("seed", number, 1 << 64)
    return number


def further_names(pairs: Pairs, model: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    """The names that a model has for parameters of a list, but that are not in the list: other names of tied parameters."""
    if model is None:
        return []
    listed, names = {id(p) for _, p, *_ in pairs}, {name for name, *_ in pairs}
    every = model.named_parameters(remove_duplicate=False)
    return [(name, p) for name, p in every if id(p) in listed and name not in names]


def trained(p: Tensor) -> nn.Parameter:
    """Returns the parameter itself; for a plain tensor, or a frozen parameter that is listed, a parameter on its storage."""
    if isinstance(p, nn.Parameter) and p.requires_grad:
        return p
    return nn.Parameter(p.detach(), requires_grad=True)


def decay_of_names(names: Iterable[str], without: Sequence[str], lr: Scalar, weight_decay: float) -> Tensor | None:
    """1 - lr * weight_decay for each name, 1 where the name contains one of the words; None without weight decay.

    The comparison is case-sensitive, as in the trainers that are served.
    """
    if not weight_decay:
        return None
    decays = [0.0 if any(word in name for word in without) else weight_decay for name in names]
    return 1.0 - lr * torch.tensor(decays, dtype=torch.float64, device="cpu")
