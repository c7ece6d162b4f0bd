"""Sends a few words from every rank to the first, and the first rank's answer to all.

It is a star, not a ring: the first rank adds in the order of ranks, so that all receive the same bits; a lost rank is known by
name; and all others hear of it at once.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import torch
from torch import Tensor, distributed

from ...errors import PeerLostError

_GOOD, _LOST = 0, 1
_GRACE = 10.0  # seconds for the other ranks to receive the news of a lost rank
_TAG = 0x1020

Reduce = Callable[[Tensor], Tensor]
"""Reduces the words of all ranks, (ranks, n) int64, to the answer, (m,) int64. Called on the first rank only."""


class Channel:
    """Exchanges small int64 tensors on the host over ``torch.distributed``'s gloo.

    Args:
        group: has gloo for the CPU; None makes a group of all ranks, which every rank has to do.
        timeout: seconds to wait for another rank.

    Attributes:
        rank, size: this process's rank in the group, and the number of ranks.
        peers: the global ranks of the group.
        sent, received: bytes of payload so far.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised, or has no gloo.
    """

    def __init__(self, group: distributed.ProcessGroup | None, timeout: float) -> None:
        if not distributed.is_available() or not distributed.is_initialized():
            raise RuntimeError(
                "parallel= needs torch.distributed: start the script with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
        if not distributed.is_gloo_available():
            raise RuntimeError("parallel= exchanges its scalars over gloo, which this build of torch is without")
        self._timeout = datetime.timedelta(seconds=timeout)
        self._group = distributed.new_group(backend="gloo", timeout=self._timeout) if group is None else group
        self.rank = distributed.get_rank(self._group)
        self.size = distributed.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError("this rank is not in the group that parallel= was given")
        self.peers = distributed.get_process_group_ranks(self._group)
        self.sent = self.received = 0

    def exchange(self, words: Tensor, answer: int, reduce: Reduce) -> Tensor:
        """Sends every rank's words to the first, and returns its answer.

        Args:
            words: (n,) int64 on the CPU, n the same on every rank.
            answer: m, the length of the answer.
            reduce: makes the answer on the first rank.

        Returns:
            (m,) int64, the same bits on every rank.

        Raises:
            PeerLostError: a rank could not be reached.
        """
        if self.size == 1:
            return reduce(words[None])
        return self._lead(words, answer, reduce) if self.rank == 0 else self._follow(words, answer)

    def _lead(self, words: Tensor, answer: int, reduce: Reduce) -> Tensor:
        rows = torch.empty(self.size, len(words), dtype=torch.int64, device="cpu")
        rows[0] = words
        start, rank = time.monotonic(), 1
        try:
            arriving: list[distributed.Work | None] = []
            while len(arriving) < self.size - 1:
                rank = len(arriving) + 1
                arriving.append(distributed.irecv(rows[rank], self.peers[rank], self._group, _TAG))
            rank = 0
            for work in arriving:
                rank += 1
                work.wait(self._timeout)  # type: ignore[union-attr]
        except RuntimeError as error:
            self._tell(torch.tensor([_LOST, rank, *[0] * answer], dtype=torch.int64, device="cpu"), skip=rank, seconds=_GRACE)
            raise _lost(f"rank {rank}", start, error) from None
        self.received += rows[1:].nbytes
        result = reduce(rows)
        message = torch.cat((torch.tensor([_GOOD, 0], dtype=torch.int64, device="cpu"), result))
        failed = self._tell(message, skip=0, seconds=self._timeout.total_seconds())
        if failed is not None:
            raise _lost(f"rank {failed[0]}", start, failed[1])
        self.sent += (self.size - 1) * message.nbytes
        return result

    def _tell(self, message: Tensor, skip: int, seconds: float) -> tuple[int, RuntimeError] | None:
        """Sends the answer. Returns the first rank that could not be reached and the error, or None."""
        failed: tuple[int, RuntimeError] | None = None
        leaving = []
        end = time.monotonic() + seconds
        for rank in range(1, self.size):
            if rank == skip:
                continue
            try:
                leaving.append((rank, distributed.isend(message, self.peers[rank], self._group, _TAG)))
            except RuntimeError as error:
                failed = failed or (rank, error)
        for rank, work in leaving:
            try:
                work.wait(datetime.timedelta(seconds=max(0.01, end - time.monotonic())))  # type: ignore[union-attr]
            except RuntimeError as error:  # noqa: PERF203  (each rank is waited for)
                failed = failed or (rank, error)
        return failed

    def _follow(self, words: Tensor, answer: int) -> Tensor:
        message, start = torch.empty(answer + 2, dtype=torch.int64, device="cpu"), time.monotonic()
        try:
            # Receiving starts before anything is sent: news of a lost rank then arrives, whatever became of this rank's words.
            arriving = distributed.irecv(message, self.peers[0], self._group, _TAG)
            leaving = distributed.isend(words, self.peers[0], self._group, _TAG)
            arriving.wait(self._timeout)  # type: ignore[union-attr]
        except RuntimeError as error:
            raise _lost("rank 0, or another that it waits for,", start, error) from None
        self.sent, self.received = self.sent + words.nbytes, self.received + message.nbytes
        status, rank = message[:2].tolist()
        if status == _LOST:
            raise PeerLostError(f"rank {rank} is gone (rank 0 says so)")
        leaving.wait(self._timeout)  # type: ignore[union-attr]
        return message[2:]


def _lost(who: str, start: float, error: RuntimeError) -> PeerLostError:
    reason = str(error).splitlines()[0].partition("] ")[2] or str(error)
    return PeerLostError(f"{who} is gone after {time.monotonic() - start:.1f} s of waiting ({reason.split('. ')[0]})")
