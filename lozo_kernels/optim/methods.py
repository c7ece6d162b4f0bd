"""The optimisers by method: LOZO, LOZO-M, AGZO, MeZO, MeZO-M, SubZero, ZO-Muon and GRZO."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..kernels.op_table import MAX_PARTS
from ..model.handle import Handle
from .optimizer import ZerothOrderOptimizer
from .parallel import Parallel
from .steps import StepSettings


class LOZO(ZerothOrderOptimizer):
    """Low-rank zeroth-order SGD (Chen et al., ICLR 2025, Algorithm 1); with ``momentum`` LOZO-M (Algorithm 2).

    The loss is evaluated at X +- eps U V^T, with U new every step and V every ``interval`` steps, and X moves by -lr c U V^T / r.
    One-dimensional tensors have dense Gaussian directions. A learning rate of the published code, which leaves 1/r out, is ``r``
    times smaller: use ``scaling="published"`` or multiply it by the rank (see :class:`~lozo_kernels.model.config.PatchConfig`).

    Example::

        optimizer = LOZO(model, lr=1e-6, rank=2, interval=50)
        for batch in loader:
            loss = optimizer.step(lambda: model(**batch).loss)
    """

    estimator = "lowrank"


class AGZO(ZerothOrderOptimizer):
    """LOZO whose V follows the inputs of each linear layer (Lin et al., ICML 2026): directions U V^T with V = sqrt(n) A.

    The gradient of a linear layer is made of rows of its inputs, of which a random V has little. A (n x r) is an orthonormal basis
    of their strongest directions. When a window begins, the closures of its first step are called once more at the unperturbed
    weights (three times for the first window), and A <- qr(H^T (H A)) for the inputs H of each layer. Embeddings, ``Conv1D``,
    convolutions and whatever no linear layer runs on keep the V of LOZO: ``handle.report()`` and a warning name them. Good learning
    rates are much smaller than LOZO's. ``momentum`` is that of LOZO-M.

    Example::

        optimizer = AGZO(model, lr=1e-7, rank=2, interval=50)
    """

    estimator = "guided"


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (Malladi et al., 2023) with dense Gaussian directions; with ``momentum`` MeZO-M.

    MeZO-M keeps an fp32 momentum of the size of the model. Directions are regenerated from the seed at every use.
    """

    estimator = "dense"


class SubZero(ZerothOrderOptimizer):
    """Zeroth-order SGD in random subspaces (Yu et al., 2024), along directions U S V^T sqrt(rows * cols) / rank.

    U and V are orthonormal and drawn every ``interval`` steps (the reference's ``update_interval``), S is new every step; X moves
    by -lr c times the direction. One-dimensional tensors have dense Gaussian directions, and the tensors of PEFT adapters are
    seen as nearly square matrices (``square``). The published settings are rank 8 and an interval of 1000 or 2000. ``momentum`` is
    kept in the left factor, as LOZO-M's.

    Example::

        optimizer = SubZero(model, lr=1e-6, rank=8, interval=1000)
    """

    estimator = "subspace"


class ZOMuon(ZerothOrderOptimizer):
    """Zeroth-order SGD with updates that are orthogonal in a subspace (Lang et al., arXiv 2602.17155): X moves by
    -lr N (N^T N)^(-1/2) V^T, where N is the mean of c U over the directions of a step, and V orthonormal.

    The loss is evaluated at X +- eps U V^T sqrt(columns / rank), with a new U for every direction and a new V every ``interval``
    steps. Elements of such a direction have variance 1, so that eps means what MeZO's does; lr is the paper's, the spectral norm
    of an update. With ``momentum`` N is its running mean, and is carried to the next V as LOZO-M's.

    One-dimensional tensors move by -lr' c Z as MeZO's do. lr' is 1e-5 lr, the published code's 1e-7 beside 1e-2, unless their
    parameter group has an lr of its own. Defaults are the published settings: rank 64, interval 100, four one-sided directions.
    ``lr="auto"``, ``normalise``, captured steps and sharded weights are not for this method.

    Example::

        optimizer = ZOMuon(model, lr=1e-2)
    """

    estimator = "muon"
    dense_share = 1e-5

    def __init__(
        self,
        target: nn.Module | Handle,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor | str = 1e-2,
        directions: int = 4,
        two_sided: bool = False,
        **options: Any,
    ) -> None:
        patched = {} if isinstance(target, Handle) else {"rank": 64, "interval": 100}
        super().__init__(target, params, lr=lr, directions=directions, two_sided=two_sided, **patched | options)

    def _check_handle(self, handle: Handle, settings: StepSettings, parallel: Parallel | None) -> None:
        super()._check_handle(handle, settings, parallel)
        if settings.normalise is not None:
            raise ValueError("updates of ZO-Muon have one length whatever the scale of c: leave normalise out")


class GRZO(ZerothOrderOptimizer):
    """Zeroth-order SGD with a direction for each part of a batch (arXiv 2606.02857): LOZO's U V^T with random signs of its own.

    In two forward passes each of ``directions`` equal parts of a batch is evaluated at X +- eps Z_i, where Z_i is
    diag(r_i) U V^T diag(s_i), and X moves by -lr / r times the mean of a_i Z_i, where a_i is c_i over the standard deviation of all
    c_i (``normalise="spread"``, without which steps diverge). One-dimensional tensors have one dense direction for all parts.

    It needs ``step(closure, inputs)`` with one loss for each example. It is always a probe (``placement="probe"``), of the matrices
    of linear and embedding layers: exclude others. The paper divides a step by 2 eps too, so the learning rate here is its own over
    2 eps.

    Args:
        directions: the parts, which the number of examples is a multiple of; at most 256.
        target, params, normalise, options: as for :class:`ZerothOrderOptimizer`. Momentum, ``two_sided=False``,
            ``evaluation``, ``drive``, ``lr="auto"`` and ``parallel="directions"`` are refused.

    Example::

        optimizer = GRZO(model, lr=1e-3, rank=2, interval=50, directions=16)
        for batch in loader:  # of 16, 32, ... examples
            loss = optimizer.step(losses_of_examples, batch)
    """

    estimator = "perexample"

    def __init__(
        self,
        target: nn.Module | Handle,
        params: Iterable[Any] | None = None,
        *,
        directions: int = 8,
        normalise: str | None = "spread",
        **options: Any,
    ) -> None:
        placed = options if isinstance(target, Handle) else {"placement": "probe"} | options
        super().__init__(target, params, directions=directions, normalise=normalise, **placed)

    def _check_handle(self, handle: Handle, settings: StepSettings, parallel: Parallel | None) -> None:
        asked = {
            "momentum": settings.momentum > 0,
            "two_sided=False": not settings.two_sided,
            f"evaluation={settings.evaluation!r}": settings.by_example,
            "drive": handle.backward is not None,
            "parallel='directions'": parallel is not None and parallel.mode == "directions",
        }
        wrong = next((name for name, given in asked.items() if given), None)
        if wrong is not None:
            raise ValueError(_not_for_parts(wrong))
        if settings.directions > MAX_PARTS:
            raise ValueError(f"directions are the parts of a batch, at most {MAX_PARTS}, not {settings.directions}")
        super()._check_handle(handle, settings, parallel)


def _not_for_parts(what: str) -> str:
    return f"{what} is not for directions per example (GRZO): leave it out, or use LOZO"


OPTIMIZERS: dict[str, type[ZerothOrderOptimizer]] = {kind.estimator: kind for kind in (LOZO, MeZO, SubZero, ZOMuon, AGZO, GRZO)}
"""The class for each estimator of :class:`~lozo_kernels.PatchConfig`."""
