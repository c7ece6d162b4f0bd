"""The batch of a measured step, and a closure that times itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import starmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optim.optimizer import ZerothOrderOptimizer
from .clock import Clock, HostClock

Forward = Callable[..., Tensor]

LENGTH = 128
_IGNORED = -100


class CausalBatch:
    """A fixed random batch. Called with a model, it returns the model's own language modelling loss.

    Args:
        tokens: how many the batch has. All sequences have the same length, which divides this number.
        positions: the longest sequence that the model takes.
        length: the most tokens that a sequence may have.
        sequences: the least number of sequences, where the tokens can be divided in that way.
    """

    def __init__(self, tokens: int, device: torch.device, positions: int, length: int = LENGTH, sequences: int = 1) -> None:
        most = min(tokens, length, positions)
        # One token has no next one to predict.
        shared = [n for n in range(2, min(most, tokens // sequences) + 1) if tokens % n == 0]
        length = max(shared or [n for n in range(1, most + 1) if tokens % n == 0])
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, 1000, (tokens // length, length), generator=generator, dtype=torch.int64, device="cpu").to(
            device
        )

    def __call__(self, model: nn.Module) -> Tensor:
        """Returns the mean loss of a token, as the model computes it."""
        return model(input_ids=self.ids, labels=self.ids).loss

    @staticmethod
    def losses(model: nn.Module, ids: Tensor) -> Tensor:
        """Returns the mean loss of each sequence, (sequences,); the mean of these is the model's loss."""
        logits = model(input_ids=ids).logits.float()
        labels = F.pad(ids[:, 1:], (0, 1), value=_IGNORED)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none")
        return losses.view(ids.shape).sum(1) / (ids.shape[1] - 1)


class TimedClosure:
    """A closure that measures which part of a step is spent in it.

    Args:
        forward: computes the loss.
        inputs: examples, which the step hands to the closure in parts; None for a step without them.
    """

    def __init__(self, forward: Forward, clock: Clock | None = None, inputs: Tensor | None = None) -> None:
        self._forward = forward
        self._clock = clock or HostClock()
        self._inputs = () if inputs is None else (inputs,)
        self._inside: list[tuple[Any, Any]] = []
        self._steps: list[tuple[tuple[Any, Any], list[tuple[Any, Any]]]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the loss, or the losses of the given examples."""
        start = self._clock.mark()
        loss = self._forward(*inputs)
        self._inside.append((start, self._clock.mark()))
        return loss

    def step(self, optimizer: ZerothOrderOptimizer) -> None:
        """Takes a step of an optimiser."""
        self._inside = []
        start = self._clock.mark()
        optimizer.step(self, *self._inputs)
        self._steps.append(((start, self._clock.mark()), self._inside))

    def shares(self) -> list[float]:
        """Returns what every step so far took beyond its own forward passes, as a fraction of them. Waits for the device."""
        self._clock.wait()
        return [self._clock.seconds(*whole) / sum(starmap(self._clock.seconds, inside)) - 1.0 for whole, inside in self._steps]
