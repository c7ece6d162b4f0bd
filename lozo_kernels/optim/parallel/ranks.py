"""Which part of a step each rank evaluates, and how the results of all ranks are combined and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from ...errors import DivergenceError, PeerLostError
from ...kernels.checks import as_integer, check_number
from ...kernels.noise import CONTRACT_VERSION
from ...model.handle import Handle
from ...model.sharding import ranks_of, reshard
from ..steps import StepInfo
from .agreement import check_agreement
from .channel import Channel
from .tensor_hash import combine, fingerprints, place_of_shards, sample, starting_weights, trained_shards, trained_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("examples", "directions")
_COLUMNS = ("step", "scalars", "weights", "shards")
"""The first words of a message: the step, and digests of the scalars so far, of a sample of the weights, and of shards."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of payload that this rank sent and received, in its last step and since it was connected."""

    sent: int
    received: int
    total_sent: int
    total_received: int


class Parallel:
    """Several processes, one run: ``LOZO(model, ..., parallel="examples")``, or ``parallel=Parallel("examples", ...)``.

    Every rank has the whole model (or its shards of it), makes the same passes over its weights from the same seed, and evaluates
    a part of each step; per step they exchange losses, in fp64, over gloo. The first rank adds them in the order of ranks, so that
    all have the same bits. Shards are compared between ranks that have the same ones.

    Args:
        mode: "examples": each rank's closure is for its own examples, and losses are averaged. Ranks count alike if closures
            return a loss; if they return (sum, weight), or are given ``inputs``, every example does. "directions": all closures are
            for the same batch, and each rank evaluates some of the ``directions``, at least one.
        group: a process group with gloo; None: all ranks, in a group of its own.
        check_every: steps between two comparisons of all weights. Losses, scalars, learning rates and a sample of the weights
            are compared in each step.
        timeout: seconds to wait for a rank that does not answer. A rank whose process ends is noticed at once.

    Raises:
        ValueError, TypeError: an argument is of the wrong type or out of range.
    """

    def __init__(
        self, mode: str = "examples", *, group: ProcessGroup | None = None, check_every: int = 100, timeout: float = 300.0
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"parallel is one of {', '.join(map(repr, MODES))}, or a lozo_kernels.Parallel, not {mode!r}")
        check_every = as_integer("check_every", check_every, 1)
        check_number("timeout", timeout, low=0.0, open_low=True)
        self.mode = mode
        self.check_every = check_every
        self.timeout = timeout
        self._given = group
        self._channel: Channel | None = None
        self._handle: Handle
        self._digest = 0
        self._first: int | None = None
        self._agreed: int | None = None
        self._before = (0, 0)
        self._places: list[int] | None = None

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return self._connected.rank

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return self._connected.size

    @property
    def traffic(self) -> Traffic:
        """The bytes exchanged in addition to the model's own communication."""
        channel = self._connected
        sent, received = self._before
        return Traffic(channel.sent - sent, channel.received - received, channel.sent, channel.received)

    def connect(self, handle: Handle, directions: int, facts: dict[str, Any]) -> None:
        """Finds the other ranks and compares what they start with. The optimiser calls this with its settings as ``facts``.

        Raises:
            RuntimeError: ``torch.distributed`` is not initialised; or this is connected already.
            ValueError: more ranks than directions to share, a model that cannot be shared so, or ranks that do not agree.
        """
        if self._channel is not None:
            raise RuntimeError("this Parallel serves another optimiser already: make one for each")
        spread = {name: ranks for name, p in handle.model.named_parameters() if (ranks := ranks_of(p))}
        if self.mode == "directions" and spread:
            raise ValueError("the ranks of a sharded model run each forward together: use parallel='examples'")
        channel = Channel(self._given, self.timeout)
        for name, ranks in spread.items():
            if not set(ranks) <= set(channel.peers):
                raise ValueError(
                    f"{name!r} is in shards on the ranks {ranks}, which have to take every step together, and the group of "
                    f"parallel= has the ranks {channel.peers}"
                )
        weights = starting_weights(handle)
        facts = facts | {
            "contract version": CONTRACT_VERSION,
            "ranks": channel.size,
            "parallel": self.mode,
            "check_every": self.check_every,
            "parameters": {f"of {p.name!r}:": [p.kind, list(p.extent), str(p.tensor.dtype)] for p in handle.trained},
            "weights": {
                f"of {n!r}": f"{v & (1 << 64) - 1:016x}" for n, v in zip(weights, fingerprints([*weights.values()]), strict=True)
            },
        }
        check_agreement(channel, facts)
        if self.mode == "directions" and channel.size > directions:
            raise ValueError(
                f"{channel.size} ranks share {directions} directions: give at least one to each (directions={channel.size}), or "
                "use parallel='examples'"
            )
        self._channel, self._handle = channel, handle
        self._compare_shards()

    def _compare_shards(self) -> None:
        """Finds the ranks that have the same shards, and compares their shards."""
        channel = self._connected
        places = channel.exchange(
            torch.tensor([place_of_shards(self._handle)], dtype=torch.int64, device="cpu"), channel.size, Tensor.flatten
        ).tolist()
        if not any(places) or len(set(places)) == len(places):
            return
        self._places = places
        shards = trained_shards(self._handle)
        found = channel.exchange(
            torch.tensor(fingerprints([*shards.values()]), dtype=torch.int64, device="cpu"), 2, lambda rows: self._odd_shard(rows)
        )
        column, rank = found.tolist()
        if column:
            self._channel = None
            name = list(shards)[column - 1]
            raise ValueError(f"{name} on rank {rank} differs from that of other ranks with the same shard: load the same weights")

    def _odd_shard(self, rows: Tensor) -> Tensor:
        """(1 + column, rank) of the first difference between ranks that have the same shards, [0, 0] if there is none."""
        assert self._places is not None
        for place in dict.fromkeys(self._places):
            ranks = [rank for rank, other in enumerate(self._places) if other == place]
            column, odd = _odd_one(rows[ranks])
            if column:
                return torch.tensor([column, ranks[odd]], dtype=torch.int64, device="cpu")
        return torch.tensor([0, 0], dtype=torch.int64, device="cpu")

    def evaluates(self, direction: int, directions: int) -> bool:
        """Whether this rank evaluates a direction."""
        return self.mode == "examples" or direction in self._share(self.rank, directions)

    def count_of(self, rank: int, directions: int) -> int:
        """How many directions of a step a rank evaluates."""
        return directions if self.mode == "examples" else len(self._share(rank, directions))

    def share(self, values: Tensor) -> Tensor:
        """Gives every rank the values of all: (values,) fp64, as many on each, become (ranks, values) on the CPU.

        Raises:
            PeerLostError: a rank is gone.
        """
        return self._ask(values, self.size, Tensor.flatten).view(self.size, -1)

    def agree(self, values: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
        """Has the first rank make an answer, (values,) fp64, from the values of all ranks, (ranks, values), and returns it on all.

        Raises:
            PeerLostError: a rank is gone.
        """
        return self._ask(values, 1, lambda rows: answer(rows.view(torch.float64)).contiguous().view(torch.int64))

    def _ask(self, values: Tensor, times: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """What the first rank makes of the words of fp64 values of all, ``times`` as many words, as fp64."""
        words = values.detach().to("cpu", torch.float64).contiguous().view(torch.int64)
        try:
            answer = self._connected.exchange(words, times * len(words), reduce)
        except PeerLostError as error:
            raise PeerLostError(f"{error}. {self._how_to_go_on(None)}") from None
        return answer.contiguous().view(torch.float64)

    def combine(self, step: int, plus: Sequence[Tensor], minus: Sequence[Tensor], directions: int) -> tuple[Tensor, Tensor]:
        """Combines the losses of all ranks to those of the step.

        Args:
            plus, minus: (2,) fp64 each, the sum of losses and their weight, of the directions that this rank evaluates.

        Returns:
            F(+) and F(-): (directions,) fp64 each, the same bits on every rank, on the device of this rank's losses.

        Raises:
            PeerLostError: a rank is gone.
            DivergenceError: ranks are at different steps, or their scalars or weights differ.
        """
        channel, device = self._connected, plus[0].device
        self._before = channel.sent, channel.received
        losses = torch.stack((torch.stack([*plus]), torch.stack([*minus]))).cpu()  # (2, directions here, 2)
        if self.mode == "examples":
            payload = losses.flatten()
        else:
            share = torch.zeros(2, -(-directions // channel.size), dtype=torch.float64, device="cpu")
            share[:, : losses.shape[1]] = losses[..., 0] / losses[..., 1]
            payload = share.flatten()
        if self._first is None:
            self._digest = combine("\n".join(trained_state(self._handle)).encode())
        header = [step, self._digest, sample(trained_state(self._handle))]
        moving = self._places is not None and self._handle.state_in_pieces  # shards under a probe change only in a merge
        if moving:
            header.append(sample(trained_shards(self._handle)))

        def reduce(rows: Tensor) -> Tensor:
            odd = torch.tensor(_odd_one(rows[:, :3]), dtype=torch.int64, device="cpu")
            if moving and not odd[0]:
                odd = self._odd_shard(rows[:, 3:4])
                odd[0] += 3 if odd[0] else 0
            values = rows[:, len(header) :].contiguous().view(torch.float64)
            joined = self._join(values.view(channel.size, 2, -1), directions)
            return torch.cat((odd, joined.flatten().view(torch.int64)))

        try:
            answer = channel.exchange(
                torch.cat((torch.tensor(header, dtype=torch.int64, device="cpu"), payload.view(torch.int64))),
                2 + 2 * directions,
                reduce,
            )
        except PeerLostError as error:
            raise PeerLostError(f"{error}. {self._how_to_go_on(step)}") from None
        column, rank = answer[:2].tolist()
        if column:
            raise DivergenceError(self._describe(step, _COLUMNS[column - 1], rank))
        self._first = step if self._first is None else self._first
        found = answer[2:].contiguous().view(torch.float64).view(2, directions).to(device)
        return found[0], found[1]

    def committed(self, info: StepInfo, settings: Sequence[float]) -> None:
        """Notes the scalars, learning rates and weight decays of a step that was taken. Every ``check_every`` steps it calls
        :meth:`check`, which may raise."""
        self._digest = combine((self._digest, info.step, *info.c.tolist(), *settings))
        if (info.step + 1) % self.check_every == 0:
            self.check(info.step)

    def check(self, step: int | None = None) -> None:
        """Compares all that was trained on every rank, which reads the weights once. Every rank has to call it.

        Args:
            step: the last step that was taken, for the message.

        Raises:
            DivergenceError: weights, momentum or factors differ.
            PeerLostError: a rank is gone.
        """
        channel = self._connected
        state = trained_state(self._handle)
        words = fingerprints([*state.values()])
        try:
            both = torch.tensor([len(words), combine(words)], dtype=torch.int64, device="cpu")
            answer = channel.exchange(both, 2, lambda rows: torch.tensor(_odd_one(rows), dtype=torch.int64, device="cpu"))
            if answer[0] == 2:  # all ranks have as many tensors, so the one that differs can be found
                answer = 2 + channel.exchange(
                    torch.tensor(words, dtype=torch.int64, device="cpu"),
                    2,
                    lambda rows: torch.tensor(_odd_one(rows), dtype=torch.int64, device="cpu"),
                )
            elif self._places is not None and not answer[0]:
                state = trained_shards(self._handle)
                answer = channel.exchange(
                    torch.tensor(fingerprints([*state.values()]), dtype=torch.int64, device="cpu"), 2, self._odd_shard
                )
                answer = answer + 2 if answer[0] else answer
        except PeerLostError as error:
            raise PeerLostError(f"{error}. {self._how_to_go_on(None if step is None else step + 1)}") from None
        column, rank = answer.tolist()
        if not column:
            self._agreed = step
            return
        name, rank = ("what is trained", rank) if column == 1 else (list(state)[column - 3], rank - 2)
        since = "the start" if self._agreed is None else f"step {self._agreed}"
        when = "now" if step is None else f"after step {step}"
        raise DivergenceError(
            f"{name} of rank {rank} differs from the other ranks' {when}. Everything agreed at {since}, and the scalars and a "
            "sample of the weights at every step since. Something outside of the optimiser changed weights on that rank, or its "
            "memory failed: go back to a checkpoint from before"
        )

    @property
    def _connected(self) -> Channel:
        if self._channel is None:
            raise RuntimeError("this Parallel serves no optimiser yet: LOZO(model, ..., parallel=this)")
        return self._channel

    def _share(self, rank: int, directions: int) -> range:
        """The directions of a rank: they are shared equally, and the first ranks get one more if it does not divide."""
        least, more = divmod(directions, self.size)
        start = rank * least + min(rank, more)
        return range(start, start + least + (rank < more))

    def _join(self, values: Tensor, directions: int) -> Tensor:
        """Combines what the ranks sent, (ranks, 2, words) fp64, to losses, (2, directions)."""
        if self.mode == "directions":
            parts = [values[rank, :, : len(self._share(rank, directions))] for rank in range(self.size)]
            return torch.cat(parts, 1).contiguous()
        totals = values[0].clone()
        for rank in range(1, self.size):
            totals += values[rank]
        sums, weights = totals.view(2, directions, 2).unbind(-1)
        return sums / weights

    def _describe(self, step: int, what: str, rank: int) -> str:
        if what == "step":
            return f"rank {rank} is not at step {step}, or this one is not at that of the others: load the same state on all ranks"
        whose = "those of others with the same shards" if what == "shards" else "the other ranks'"
        start = f"the {what} of rank {rank} differ from {whose}"
        if self._first is None and what == "scalars":
            return f"rank {rank} keeps other factors than the other ranks do: give side= and placement= other values than 'auto'"
        if self._first is None:
            return f"{start} before step {step}, the first of this run: load the same state on all ranks"
        if what == "scalars":
            return (
                f"{start}: c, learning rate or weight decay of step {step - 1}, the first that differs. Schedules have to do the "
                "same on all ranks"
            )
        return (
            f"{start} after step {step - 1}, the first that differs as far as a sample of them tells. Something outside of the "
            "optimiser changed them on that rank, or its memory failed: go back to a checkpoint from before"
        )

    def _how_to_go_on(self, step: int | None) -> str:
        if any(map(ranks_of, self._handle.model.parameters())):
            return "Every process has its own shards alone: go on from the last checkpoint or journal, with the ranks that are left"
        last = "" if step is None else "No step was completed; " if step == 0 else f"The last complete step is {step - 1}; "
        exact = "" if self._handle.probes else ", up to one rounding of their dtype where a step was under way"
        return (
            f"{last}the weights here are those after it{exact}. Save them with optimizer.state_dict(), or take the last checkpoint "
            "or the journal, and start again with the ranks that are left: no state depends on their number"
        )


def shared_shards(model: nn.Module) -> Parallel | None:
    """How the ranks of a sharded model take steps by default, or None if nothing is sharded. Ranks with shards of one weight
    have to move them by the same c. Raises ValueError if not all ranks have shards, so that it is unclear who belongs together."""
    reshard(model)
    ranks = sorted({rank for p in model.parameters() for rank in ranks_of(p)})
    if not ranks:
        return None
    size = distributed.get_world_size()
    if len(ranks) < size:
        raise ValueError(
            f"the model is in shards on the ranks {ranks} of {size}: say which ranks take steps together, parallel='examples' for "
            "all of them, or parallel=Parallel('examples', group=mesh.get_group())"
        )
    return Parallel("examples")


def as_parallel(value: Parallel | str | None) -> Parallel | None:
    """Returns what ``parallel=`` of an optimiser asks for. Raises TypeError for anything else."""
    if value is None or isinstance(value, Parallel):
        return value
    if isinstance(value, str):
        return Parallel(value)
    raise TypeError(f"parallel is one of {', '.join(map(repr, MODES))}, or a lozo_kernels.Parallel, not {type(value).__name__}")


def _odd_one(rows: Tensor) -> list[int]:
    """(1 + column, rank) of the first difference from what most ranks have, [0, 0] if there is none. Rank 0 is right in a tie."""
    for column in range(rows.shape[1]):
        values = rows[:, column].tolist()
        most = max(values, key=values.count)
        for rank, value in enumerate(values):
            if value != most:
                return [column + 1, rank]
    return [0, 0]
