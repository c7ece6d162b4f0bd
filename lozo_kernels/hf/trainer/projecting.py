"""What a Trainer's ``compute_loss`` becomes: evaluations at the points of a step, and a loss whose backward finds c."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...model.backward import Backward
from .example_losses import ExampleLosses, evaluating


class ProjectedLoss:
    """A Trainer's ``compute_loss`` that evaluates at the points of a step when a gradient is asked for."""

    def __init__(self, drive: Backward, compute_loss: Callable[..., Any]) -> None:
        self._drive = drive
        self._compute_loss = compute_loss

    def __call__(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        """What ``Trainer.compute_loss`` returns; the outputs are those of the last evaluation."""
        if not (model.training and torch.is_grad_enabled()):
            return self._compute_loss(model, inputs, return_outputs=return_outputs, **more)
        outputs: Any = None

        def closure() -> Any:
            nonlocal outputs
            # A copy: computing a loss takes the labels out of the inputs.
            result = self._compute_loss(model, copy.copy(inputs), return_outputs=return_outputs, **more)
            loss, outputs = result if return_outputs else (result, None)
            return loss

        loss = self._drive.project(closure)
        return (loss, outputs) if return_outputs else loss


class ProjectedLosses:
    """As :class:`ProjectedLoss`, for evaluations that need the loss of each example. The model is in eval mode for them.

    Args:
        trainer: whose loss it is.
        losses: of the examples of a batch.
        timed: gets ``losses`` and gives what is called in its place.
    """

    def __init__(
        self,
        drive: Backward,
        compute_loss: Callable[..., Any],
        trainer: Any,
        losses: ExampleLosses,
        timed: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._drive, self._compute_loss, self._trainer, self._losses = drive, compute_loss, trainer, losses
        self._timed = timed(losses)

    def __call__(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **more: Any
    ) -> Any:
        """What ``Trainer.compute_loss`` returns, without outputs.

        Args:
            num_items_in_batch: labels of all micro-batches of the step, over which the Trainer has its loss a mean.
        """
        if not (model.training and torch.is_grad_enabled()):
            more |= {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            return self._compute_loss(model, inputs, **more)
        plain = self._drive.model
        weight: Any = 0.0

        def closure(batch: Any) -> Any:
            nonlocal weight
            found = self._timed(plain, batch)
            if self._losses.given is None:
                copies = len(batch["labels"]) / len(inputs["labels"])  # of the batch, for evaluations that share a forward pass
                weight = found[1].sum() / copies
            return found

        with evaluating(plain):
            with torch.no_grad():
                self._losses.look(plain, inputs)
            loss = self._drive.project(closure, dict(inputs))
        if not _divides(self._trainer, num_items_in_batch):
            if self._losses.given is None and num_items_in_batch is not None:
                loss = loss * (self._processes * weight / num_items_in_batch).to(loss)
            else:
                loss = loss / self._trainer.current_gradient_accumulation_steps
        return (loss, None) if return_outputs else loss

    @property
    def _processes(self) -> int:
        """What the Trainer multiplies a mean over the labels of all processes with, which is averaged over them."""
        return self._trainer.accelerator.num_processes if self._trainer.args.average_tokens_across_devices else 1


def _divides(trainer: Any, items: Any) -> bool:
    """Whether a Trainer divides what ``compute_loss`` returned by the number of micro-batches."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    return not scaled
