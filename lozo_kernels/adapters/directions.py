"""The interface of a zeroth-order trainer to its weights, as a protocol for new trainers, and its implementation on a model."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.checks import check_number, check_scale
from ..model.config import PatchConfig
from ..model.passes import decay_of
from .listed import Pairs, Weights

_ESTIMATORS = ("lowrank", "dense")

Coefficient = float | Tensor
"""A number or a 0-dim tensor, which is not read on the host."""


@runtime_checkable
class PerturbationBackend(Protocol):
    """Weights that move along directions, each named by a seed: D(seed) is the same at every call and on every machine.

    Everything that a zeroth-order trainer, a federated client or server, or an evolution strategy does to its weights is one
    of these three calls; what it sends and stores is seeds and scalars.
    """

    def perturb(self, seed: int, scale: float) -> None:
        """X += scale * D(seed). A second call with the same seed and the opposite scale undoes it."""

    def update(self, seeds: Sequence[int], coefficients: Sequence[Coefficient], lr: float, weight_decay: float = 0.0) -> None:
        """X <- (1 - lr * weight_decay) X - lr * sum of coefficient * D(seed), with the factor that the estimator puts into updates.

        A trainer with one direction gives [seed] and [c]; a federated server all clients' seeds with c / clients; an evolution
        strategy, which climbs, its members' seeds with -reward / members.
        """

    def revert(self, seeds: Sequence[int], coefficients: Sequence[Coefficient], lr: float, weight_decay: float = 0.0) -> None:
        """Undoes an :meth:`update` that had the same arguments, up to rounding."""


class DirectionBackend:
    """A :class:`PerturbationBackend` over the parameters of a model. Each call is one call of an op per kind, device and seed.

    Args:
        parameters: a module, whose parameters that require a gradient move, tied ones once; or (name, tensor) pairs.
        estimator: "lowrank" (U V^T for matrices, dense noise for one-dimensional tensors) or "dense".
        rank: columns of U and V.
        v_seed: V is drawn from this seed and the window (:meth:`enter_window`), the same for all directions (LOZO); None draws V,
            like U, from the seed of each direction, so that a log of seeds and scalars is enough to repeat a run.
        scaling: where 1/r goes, see :class:`~lozo_kernels.PatchConfig`: the default puts it into updates.
        rounding: how updates are rounded into bf16 and fp16, "nearest" or "stochastic".
        backend: name of a backend; None for the best of each device.

    Raises:
        TypeError, ValueError: a setting or a parameter does not fit; nothing was changed.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        estimator: str = "lowrank",
        rank: int = 2,
        v_seed: int | None = None,
        scaling: str = "paper",
        rounding: str = "nearest",
        backend: str | None = None,
    ) -> None:
        if estimator not in _ESTIMATORS:
            raise ValueError(f"estimator is one of {', '.join(map(repr, _ESTIMATORS))}, not {estimator!r}")
        pairs = None if isinstance(parameters, nn.Module) else _listed(parameters)
        config = PatchConfig(
            estimator, rank, seed=0 if v_seed is None else v_seed, scaling=scaling, rounding=rounding, backend=backend
        )
        model = parameters if isinstance(parameters, nn.Module) else None
        self._pairs: Pairs | None = pairs
        self._weights = Weights(config, model)
        self._shared = v_seed is not None
        self._window = 0
        self._drawn: tuple[int, int] | None = None
        with torch.inference_mode(False):
            self._weights.listed(self._pairs)

    @property
    def names(self) -> list[str]:
        """The names of the parameters that move."""
        return self._weights.listed(self._pairs).handle.names

    def enter_window(self, window: int) -> None:
        """Sets the window, step // interval in LOZO, whose V the following calls use. Raises RuntimeError without a ``v_seed``."""
        if not self._shared:
            raise RuntimeError("every direction has a V of its own: give DirectionBackend a v_seed for one that lasts a window")
        self._window = operator.index(window)

    def perturb(self, seed: int, scale: float) -> None:
        """X += scale * D(seed), as in :class:`PerturbationBackend`. Raises ValueError if seed or scale is out of range."""
        check_scale(scale)
        with torch.inference_mode(False), torch.no_grad():
            self._weights.perturb(self._enter(seed), seed, scale)

    def update(self, seeds: Sequence[int], coefficients: Sequence[Coefficient], lr: float, weight_decay: float = 0.0) -> None:
        """X <- (1 - lr * weight_decay) X - lr * sum of coefficient * D(seed), as in :class:`PerturbationBackend`.

        Raises:
            ValueError: seeds and coefficients do not match or are none, or a number is out of range; nothing was changed.
        """
        pairs = self._check(seeds, coefficients, lr, weight_decay)
        decay = decay_of(lr, weight_decay)
        for i, (seed, c) in enumerate(pairs):
            self._move(seed, -lr * c, decay if i == 0 else None, i)

    def revert(self, seeds: Sequence[int], coefficients: Sequence[Coefficient], lr: float, weight_decay: float = 0.0) -> None:
        """Undoes :meth:`update`: first the directions in reverse order, then the decay.

        Raises:
            ValueError: as :meth:`update`, or the update multiplied the weights by 0.
        """
        pairs = self._check(seeds, coefficients, lr, weight_decay)
        kept = 1.0 - lr * weight_decay
        if kept == 0.0:
            raise ValueError("lr * weight_decay is 1: nothing of the weights before the update is left")
        for i, (seed, c) in reversed(list(enumerate(pairs))):
            last = i == 0
            self._move(seed, lr * c / kept if last else lr * c, 1.0 / kept if last and kept != 1.0 else None, i)

    def _move(self, seed: int, gradient: Coefficient, decay: Coefficient | None, index: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._weights.update(self._enter(seed), seed, gradient, decay=decay, index=index)

    def _check(
        self, seeds: Sequence[int], coefficients: Sequence[Coefficient], lr: float, weight_decay: float
    ) -> list[tuple[int, Coefficient]]:
        if len(seeds) != len(coefficients) or not len(seeds):
            raise ValueError(f"there are {len(seeds)} seeds for {len(coefficients)} coefficients; give one each, at least one")
        for name, value in (("lr", lr), ("weight_decay", weight_decay), *(("a coefficient", c) for c in coefficients)):
            check_number(name, value)
        for seed in seeds:
            _check_seed(seed)
        return list(zip(map(operator.index, seeds), coefficients, strict=True))

    def _enter(self, seed: int) -> Pairs | None:
        """Draws V unless it is in memory. Returns the list of parameters that move."""
        _check_seed(seed)
        where = (self._weights.config.seed, self._window) if self._shared else (operator.index(seed), 0)
        if self._drawn != where:
            for group in self._weights.listed(self._pairs).handle.groups:
                if group.kind == "lowrank":
                    ops.resample_(group.table, seed=where[0], window=where[1], backend=group.backend)
            self._drawn = where
        return self._pairs


def _listed(parameters: Iterable[tuple[str, Tensor]]) -> Pairs:
    what = "DirectionBackend takes a module or (name, tensor) pairs"
    if not isinstance(parameters, Iterable) or isinstance(parameters, (str, Tensor)):
        raise TypeError(f"{what}, not {type(parameters).__name__}")
    pairs = list(parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise TypeError(f"{what}; one of the list is {type(pair).__name__}")
        if not pair[1].is_floating_point():
            raise TypeError(f"{what} that can move; {pair[0]!r} has {pair[1].dtype}")
    return pairs


def _check_seed(seed: int) -> None:
    PatchConfig(seed=seed)
