"""Cases of the ops on activations whose sums are exact in fp32 in any order, so that every bit of their results is known.

Sums over activations are not promised in bits. But where all numbers are small multiples of a power of two, no addition rounds,
and every right kernel gives the same sums. Only the last rounding, into the dtype of the outputs, is left, and it has one result.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import skinny
from ..kernels.calls import LayerCall
from ..kernels.noise import MAX_DRAW
from ..kernels.registry import Backend
from .cases import Compared, compare_storage, copy_tensor, strided

LINEAR, EMBEDDING = "lowrank_linear_", "lowrank_embedding_"

_SIZES = {  # tokens of an evaluation, rows and columns of the weight
    "tiny": (13, 33, 72),
    "odd": (19, 37, 129),
    "large": (64, 320, 2064),  # long rows, which are summed in parts
}
_X = (1.0, -1.0, 2.0, -2.0)  # of which a token has three, so that its sums are at most 12
_V = (0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0)
_SCALES = (1.0, -1.0, 0.5, -0.5)  # U has 11 bits above 2^-8, and B + scale * U has 11 above 2^-9
_FINE = 2.0**-14


class LayerPlan(NamedTuple):
    """A case before its random inputs are drawn.

    Attributes:
        op: :data:`LINEAR` or :data:`EMBEDDING`.
        layout: of :data:`_SIZES`.
        dtype: of inputs and outputs.
        rank: of the factors.
        groups: evaluations that share the call.
        transposed: whether a linear layer computes X W.
        more: whether there are a gain and, for a linear layer, a shift.
        fine: activations have 16 bits, which tensor cores take in two parts; U is left out, so that sums stay exact.
    """

    op: str
    layout: str
    dtype: torch.dtype
    rank: int
    groups: int = 1
    transposed: bool = False
    more: bool = False
    fine: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("transposed", "more", "fine") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} {self.layout} {dtype} rank {self.rank}, {', '.join([f'{self.groups} groups', *flags])}"

    def case(self, seed: int) -> LayerCase:
        """Draws the case of a seed, on the CPU. The state of torch's generators stays as it is."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self._draw(random.Random(seed))

    def _draw(self, rng: random.Random) -> LayerCase:
        size, rows, cols = _SIZES[self.layout]
        tokens, lookup = size * self.groups, self.op == EMBEDDING
        inputs, outputs = (rows, cols) if self.transposed else (cols, rows)
        outputs = cols if lookup else outputs
        step = 8 if self.layout == "large" else 1
        y = strided(rng, (1, tokens, outputs), self.dtype, step=step)[0]
        y.copy_(_integers(y.shape, 32) / 8)
        call = LayerCall(
            y=y,
            x=_ids(tokens, rows, rng) if lookup else _activations(rng, (tokens, inputs), self.dtype, step, self.fine),
            v=_chosen((self.rank, cols), (1.0, -1.0) if self.fine else _V).half(),
            b=_integers((rows, self.rank), 4) if self.fine else _integers((rows, self.rank), 256) / 256,
            seed=rng.getrandbits(64),
            tensor_id=rng.getrandbits(32),
            row_offset=rng.choice((0, 5, 1 << 20)),
            draws=torch.tensor(
                [[rng.randrange(MAX_DRAW), rng.choice((0, 3, rng.getrandbits(24)))] for _ in range(self.groups)],
                dtype=torch.int64,
                device="cpu",
            ),
            scales=torch.zeros(self.groups, dtype=torch.float32, device="cpu") if self.fine else _chosen((self.groups,), _SCALES),
            transposed=self.transposed,
            gain=_chosen((1,), (0.5, 1.5)) if self.more else None,
            shift=_integers((self.groups, outputs), 256) / 64 if self.more and not lookup else None,
        )
        return LayerCase(self.op, call)


@dataclasses.dataclass
class LayerCase:
    """A call of an op on activations.

    Attributes:
        op: its name.
        call: all of its arguments.
    """

    op: str
    call: LayerCall

    def on(self, device: torch.device | str = "cpu") -> LayerCase:
        """Copies the case to a device, on storage of its own with the same layout."""
        tensors = {f.name: getattr(self.call, f.name) for f in dataclasses.fields(self.call)}
        copies: dict[str, Any] = {name: copy_tensor(t, device) for name, t in tensors.items() if isinstance(t, Tensor)}
        return LayerCase(self.op, dataclasses.replace(self.call, **copies))

    def run(self, backend: Backend | None) -> None:
        """Makes the call."""
        c = self.call
        shared: dict[str, Any] = {
            "seed": c.seed,
            "tensor_id": c.tensor_id,
            "row_offset": c.row_offset,
            "draws": c.draws,
            "scales": c.scales,
        }
        if self.op == EMBEDDING:
            skinny.lowrank_embedding_(c.y, c.x, c.v, c.b, **shared, gain=c.gain, backend=backend)
        else:
            more: dict[str, Any] = {"transposed": c.transposed, "gain": c.gain, "shift": c.shift}
            skinny.lowrank_linear_(c.y, c.x, c.v, c.b, **shared, **more, backend=backend)

    def compare(self, want: LayerCase) -> list[Compared]:
        """Compares all storage of the outputs with those of another case after its call bit for bit, gaps included."""
        return [compare_storage("y", self.call.y, want.call.y)]


def _integers(shape: tuple[int, ...] | torch.Size, most: int) -> Tensor:
    """Makes fp32 integers of at most a size."""
    return torch.randint(-most, most + 1, tuple(shape), dtype=torch.int64, device="cpu").float()


def _chosen(shape: tuple[int, ...], values: tuple[float, ...]) -> Tensor:
    """Makes fp32 numbers that are each one of some values."""
    chosen = torch.randint(len(values), shape, dtype=torch.int64, device="cpu")
    return torch.tensor(values, dtype=torch.float32, device="cpu")[chosen]


def _ids(tokens: int, rows: int, rng: random.Random) -> Tensor:
    return torch.randint(rows, (tokens,), dtype=rng.choice((torch.int32, torch.int64)), device="cpu")


def _activations(rng: random.Random, shape: tuple[int, int], dtype: torch.dtype, step: int, fine: bool) -> Tensor:
    """Makes activations that are zero but for three numbers a token or, where these are ``fine``, one."""
    tokens, inputs = shape
    x = strided(rng, (1, *shape), dtype, step=step)[0].zero_()
    count = 1 if fine else min(3, inputs)
    values = _integers((tokens, count), 1 << 15) * _FINE if fine else _chosen((tokens, count), _X)
    where = torch.rand(shape, dtype=torch.float32, device="cpu").topk(count, dim=1).indices
    return x.scatter_(1, where, values.to(dtype))


def layer_plans(rank: int, first: bool, turn: int) -> list[LayerPlan]:
    """Lists the cases of a rank.

    Args:
        first: whether it is the rank that matters most, which is checked with every dtype and on both sides.
        turn: chooses among dtypes and arguments, which take turns from rank to rank.
    """
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    if first:
        found = [LayerPlan(LINEAR, "large", d, rank, 2, t, more=t) for d in dtypes for t in (False, True)]
        found += [LayerPlan(EMBEDDING, "large", d, rank, 2, more=i == 1) for i, d in enumerate(dtypes)]
        return [*found, LayerPlan(LINEAR, "odd", torch.float32, rank, fine=True)]
    dtype, other = dtypes[turn % 3], dtypes[(turn + 1) % 3]
    return [
        LayerPlan(LINEAR, "large", dtype, rank, 1 + turn % 2, transposed=turn % 2 == 1),
        LayerPlan(LINEAR, "odd", other, rank, 2, transposed=turn % 2 == 0, more=True),
        LayerPlan(EMBEDDING, "odd", dtype, rank, 1 + turn % 2, more=turn % 2 == 0),
    ]


def quick_layer_plans() -> list[LayerPlan]:
    """Lists a few small cases."""
    return [
        LayerPlan(LINEAR, "tiny", torch.bfloat16, 4, groups=2),
        LayerPlan(LINEAR, "tiny", torch.float32, 4, transposed=True, more=True),
        LayerPlan(LINEAR, "tiny", torch.float32, 4, fine=True),
        LayerPlan(LINEAR, "tiny", torch.float16, 17, transposed=True),
        LayerPlan(EMBEDDING, "tiny", torch.float32, 4, groups=2),
        LayerPlan(EMBEDDING, "tiny", torch.bfloat16, 17, more=True),
    ]
