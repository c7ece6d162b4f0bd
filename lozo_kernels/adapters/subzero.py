"""SubZero's trainer (zimingyy/SubZero): directions U S V^T in a subspace that is kept for an interval."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..kernels.calls import Draw, Rounding
from ..kernels.noise import MAX_RANK, tensor_ids
from ..kernels.registry import Backend, choose_backend
from ..kernels.table import TensorTable
from ..model.estimators.subspace import orthonormal
from ..model.layout import most_square
from ..model.parameters import canonical
from ..model.passes import Scalar
from ..model.storage import check_trainable
from .base import SGD, Settings, TrainerAdapter, read_sgd
from .streams import draw_dense
from .weights import Pairs, further_names

RESHAPED = ("lora", "prefix", "prompt")
"""Values of ``args.mode`` for which a parameter is seen as the most square matrix of its size."""


@dataclasses.dataclass
class Subspace:
    """A parameter's subspace and its part in the direction.

    Attributes:
        u: (rows, rank) fp32: sqrt(rows) U, where U has orthonormal columns.
        v: (1, rank, cols) fp16: sqrt(cols) V, transposed.
        a: (1, rows, rank) fp32: the scale times sqrt(rows) U S / r.
        spread: 1/r, the direction being U S V^T sqrt(mn)/r.
        window: global_step // update_interval of U and V.

    Where the rank is above a dimension of the parameter, the columns beyond it are zero.
    """

    u: Tensor
    v: Tensor
    a: Tensor
    spread: float
    window: int


@dataclasses.dataclass
class Placed:
    """The matrices on one device as a table, with their names."""

    table: TensorTable
    names: list[str]
    ids: list[int]
    backend: Backend


class Subspaces:
    """U S V^T of many matrices: U and V from the adapter's seed and the window, S from the seed of a step."""

    def __init__(self, seed: int, rank: int, backend: str | None) -> None:
        self.seed, self.rank, self.backend = seed, rank, backend
        self.of: dict[str, Subspace] = {}
        self._key: tuple[Any, ...] | None = None
        self._placed: list[Placed] = []

    def place(self, matrices: dict[str, Tensor], window: int, identify: Callable[[], dict[str, int]]) -> list[Placed]:
        """Tables over the matrices, (rows, cols) views by name, with the subspaces of a window.

        Args:
            identify: gives the tensor id of every matrix by its name; called when something moved.
        """
        key = tuple((name, x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for name, x in matrices.items())
        if key == self._key and all(space.window == window for space in self.of.values()):
            return self._placed
        ids = identify()
        devices = dict.fromkeys(x.device for x in matrices.values())
        placed = []
        for device in devices:
            backend = choose_backend(device, self.backend).backend
            names = [name for name, x in matrices.items() if x.device == device]
            for name in names:
                old = self.of.get(name)
                if old is None or old.window != window or old.u.device != device:
                    self.of[name] = self._draw(matrices[name], ids[name], window, backend)
            spaces = [self.of[name] for name in names]
            table = TensorTable(
                [matrices[name].unsqueeze(0) for name in names],
                [ids[name] for name in names],
                v=[space.v for space in spaces],
                n=[space.a for space in spaces],
            )
            placed.append(Placed(table, names, list(table.tensor_ids), backend))
        self._key, self._placed = key, placed
        return placed

    def move(self, placed: Placed, seed: int, scale: Scalar, decay: Scalar | None = None, rounding: Rounding | None = None) -> None:
        """X <- decay * X + scale * U S V^T sqrt(mn)/r.

        Args:
            scale, decay: a number, or one value for each matrix.
            rounding: into bf16 and fp16; None for to nearest.
        """
        for t, (name, i) in enumerate(zip(placed.names, placed.ids, strict=True)):
            space = self.of[name]
            s = ops.factor(seed, self.rank, self.rank, i, Draw(0), stream="S", device=space.u.device, backend=placed.backend)
            mine = float(scale[t]) if isinstance(scale, Tensor) else scale
            # Factors on the grid of the noise have an exact product in fp64, whoever adds up.
            torch.mul((space.u.double() @ s.double()).float(), mine * space.spread, out=space.a[0])
        ops.lowrank_merge_(placed.table, seed=seed, decay=decay, rounding=rounding, backend=placed.backend)

    def _draw(self, x: Tensor, tensor_id: int, window: int, backend: Backend) -> Subspace:
        rows, cols = x.shape
        u, v = (self._basis(n, tensor_id, window, stream, x.device, backend) for n, stream in ((rows, "U"), (cols, "V")))
        spread = 1.0 / math.sqrt(min(rows, self.rank) * min(cols, self.rank))
        return Subspace(
            u.float(), v.t().contiguous().unsqueeze(0), torch.zeros(1, rows, self.rank, device=x.device), spread, window
        )

    def _basis(self, rows: int, tensor_id: int, window: int, stream: str, device: torch.device, backend: Backend) -> Tensor:
        """(rows, rank) fp16."""
        g = ops.factor(self.seed, rows, self.rank, tensor_id, Draw(window), stream=stream, device=device, backend=backend)
        return orthonormal(g.unsqueeze(0), min(rows, self.rank))[0]


class SubZeroAdapter(TrainerAdapter):
    """``zo_subspace_perturb_parameters`` and ``zo_subspace_update``, for ``torch.optim.SGD`` without momentum.

    U and V come from the adapter's seed and the window ``global_step // update_interval`` (the trainer draws them from the global
    generator, which no log of seeds can repeat), S and the noise of other tensors from ``zo_random_seed``. ``p_state`` shows what
    is in use: sqrt(rows) U, (rows, rank) fp32, and sqrt(cols) V transposed, (rank, cols) fp16.
    """

    family = "SubZero"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        self.rank: int = trainer.args.gauss_rank
        if not 1 <= self.rank <= MAX_RANK:
            raise self._refuse(f"its gauss_rank is {self.rank}, and ranks are 1 to {MAX_RANK}")

    def serve(self) -> None:
        """Replaces both methods."""
        self._dense = self._weights()
        self._spaces = Subspaces(self.settings.seed, self.rank, self.settings.backend)
        published = self.settings.compat == "published"
        self._replace("zo_subspace_perturb_parameters", self._published_perturb if published else self._perturb)
        self._replace("zo_subspace_update", self._published_update if published else self._update)

    def release(self) -> None:
        """Leaves orthonormal U and V in the dtype of the parameters, as the published methods keep them."""
        t = self.trainer
        for name, p, *_ in getattr(t, "named_parameters_to_optim", ()):
            space = self._spaces.of.get(name)
            if space is not None:
                u, v = space.u, space.v[0]
                t.p_state[name] |= {"U": (u / len(u) ** 0.5).to(p.dtype), "V": (v / v.shape[1] ** 0.5).to(p.dtype)}

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        seed = operator.index(t.zo_random_seed if random_seed is None else random_seed)
        matrices, others = self._split(t.named_parameters_to_optim)
        scale = scaling_factor * t.args.zo_eps
        for placed in self._placed(matrices):
            self._spaces.move(placed, seed, scale)
        if others:
            self._dense.perturb(others, seed, scale)

    def _update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        seed, pairs = operator.index(t.zo_random_seed), t.named_parameters_to_optim
        matrices, others = self._split(pairs)
        by_name = {name: p for name, p, *_ in pairs}
        rounding = Rounding(0) if self.settings.rounding == "stochastic" else None
        for placed in self._placed(matrices):
            sgd = self._sgd([(name, by_name[name]) for name in placed.names])
            self._spaces.move(placed, seed, -sgd.lr * t.projected_grad, sgd.decay, rounding)
        if others:
            sgd = self._sgd(others)
            self._dense.update(others, seed, -sgd.lr * t.projected_grad, decay=sgd.decay)
        self._finish()

    def _finish(self) -> None:
        self.trainer.update_steps += 1
        self.trainer.lr_scheduler.step()

    def _sgd(self, pairs: Pairs) -> SGD:
        sgd = read_sgd(self.trainer.optimizer, pairs)
        if sgd.momentum:
            raise ValueError("SubZero's SGD has momentum, a buffer as large as the weights once U and V change: set it to 0")
        return sgd

    def _placed(self, matrices: dict[str, Tensor]) -> list[Placed]:
        t = self.trainer
        placed = self._spaces.place(matrices, t.state.global_step // t.args.update_interval, self._ids) if matrices else []
        for name in matrices:
            space, shown = self._spaces.of[name], t.p_state.setdefault(name, {})
            if shown.get("U") is not space.u:
                shown |= {"U": space.u, "V": space.v[0]}
        return placed

    def _ids(self) -> dict[str, int]:
        """As :func:`~lozo_kernels.patch` has them: of the first name in the alphabet, for tied parameters too."""
        pairs, model = self.trainer.named_parameters_to_optim, getattr(self.trainer, "model", None)
        names = {id(p): [name] for name, p, *_ in pairs}
        for name, p in further_names(pairs, model if isinstance(model, nn.Module) else None):
            names[id(p)].append(name)
        first = {name: min(map(canonical, names[id(p)])) for name, p, *_ in pairs}
        ids = tensor_ids(first.values())
        return {name: ids[chosen] for name, chosen in first.items()}

    def _split(self, pairs: Pairs) -> tuple[dict[str, Tensor], Pairs]:
        """Matrices as views by name, tied ones once, and the pairs that get dense noise."""
        matrices, others, seen = {}, [], set()
        for name, p, *_ in pairs:
            if p.squeeze().dim() != 2:
                others.append((name, p))
            elif id(p) not in seen:
                seen.add(id(p))
                matrices[name] = self._matrix(name, p.detach())
        return matrices, others

    def _matrix(self, name: str, p: Tensor) -> Tensor:
        check_trainable(name, p)
        p = p.squeeze()
        if getattr(self.trainer.args, "mode", None) not in RESHAPED:
            return p
        if not p.is_contiguous():
            raise ValueError(f"parameter {name!r} is not contiguous and cannot be reshaped: param.data = param.data.contiguous()")
        return p.view(most_square(p.numel()))

    def _published_perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        torch.manual_seed(t.zo_random_seed if random_seed is None else random_seed)
        scale = scaling_factor * t.args.zo_eps
        for _, p, u, v in t.named_parameters_to_optim:
            self._published_move(p.detach(), u, v, scale)

    def _published_update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        torch.manual_seed(t.zo_random_seed)
        for name, p, u, v in t.named_parameters_to_optim:
            sgd = self._sgd([(name, p)])
            if sgd.decay is not None:
                p.detach().mul_(sgd.decay)
            self._published_move(p.detach(), u, v, -sgd.lr * t.projected_grad)
        self._finish()

    @staticmethod
    def _published_move(x: Tensor, u: Tensor, v: Tensor, scale: Any) -> None:
        if u.dim() == 1:
            x.add_(draw_dense(x), alpha=scale)
            return
        s = torch.normal(mean=0, std=1, size=(u.shape[1], v.shape[0]), device=x.device, dtype=x.dtype)
        a = (u @ s).mul_(math.sqrt(x.numel() / s.numel()))
        x.view(u.shape[0], v.shape[1]).addmm_(a, v, alpha=scale)
