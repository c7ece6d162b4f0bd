"""The loss of each example of a batch, which directions on parts of a batch need, from a model that returns the loss of all."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..objectives.base import IGNORED, token_losses

Losses = tuple[Tensor, Tensor]
"""Sums of losses and what they are sums over, (examples,) each."""
Kind = Callable[[Tensor, Tensor], Losses | None]
"""Makes them of logits and labels; None where these are of another shape."""

_TOLERANCE = 1e-5  # of the loss, where it has no larger rounding: both are means of the same numbers


def next_tokens(logits: Tensor, labels: Tensor) -> Losses | None:
    """Cross-entropy of each next token: causal language models."""
    return tokens(logits[:, :-1], labels[:, 1:]) if logits.dim() == 3 else None


def tokens(logits: Tensor, labels: Tensor) -> Losses | None:
    """Cross-entropy of each token that has a label: masked, sequence-to-sequence and token classification models."""
    return token_losses(logits, labels) if logits.dim() == 3 and labels.shape == logits.shape[:2] else None


def classes(logits: Tensor, labels: Tensor) -> Losses | None:
    """Cross-entropy of the class of each example."""
    if logits.dim() != 2 or logits.shape[1] < 2 or labels.is_floating_point() or labels.numel() != len(logits):
        return None
    labels = labels.reshape(-1)
    return F.cross_entropy(logits.float(), labels, reduction="none"), torch.ones_like(labels)


def numbers(logits: Tensor, labels: Tensor) -> Losses | None:
    """Squared error of the numbers of each example."""
    if labels.numel() != logits.numel() or not (labels.is_floating_point() or logits.shape[-1] == 1):
        return None
    each = F.mse_loss(logits.float().flatten(1), labels.float().view(len(logits), -1), reduction="none").mean(1)
    return each, torch.ones_like(each)


KINDS: tuple[Kind, ...] = (next_tokens, tokens, classes, numbers)
"""The losses that models of transformers make of their logits and labels."""


class ExampleLosses:
    """The losses of the examples of a batch, whose mean is the loss of a trainer.

    Args:
        trainer: whose loss it is; its ``compute_loss`` is taken as it is now.
        given: the user's, (model, inputs) -> losses, (examples,), or (sums, weights); None: that one of :data:`KINDS` whose mean
            is what the trainer computes.
    """

    def __init__(self, trainer: Any, given: Callable[[nn.Module, Any], Any] | None = None) -> None:
        self._trainer, self._compute_loss, self.given = trainer, trainer.compute_loss, given
        self._kind: Kind | None = None
        self._calls = 0

    def __call__(self, model: nn.Module, inputs: Any) -> Any:
        """Losses, (examples,), or (sums, weights), by one forward pass."""
        if self.given is not None:
            return self.given(model, inputs)
        sums, weights = (self._kind or tokens)(*_outputs(model, inputs))  # type: ignore[misc]
        return sums, weights + (weights.sum() == 0)  # without labels in a batch, its loss is 0

    def look(self, model: nn.Module, inputs: Any) -> None:
        """Finds out on the first batch, by two forward passes, how the loss is made of those of its examples; and sees later, in
        calls 10, 100, 1,000, ..., whether it still is.

        Raises:
            TypeError: it is made in another way.
        """
        self._calls += 1
        due = self._kind is None or str(self._calls).strip("0") == "1"
        if self.given is not None or not due or _no_labels(inputs):
            return
        whole, outputs = self._compute_loss(model, dict(inputs)), _outputs(model, inputs)
        usual = outputs is not None and self._trainer.label_smoother is None and self._trainer.compute_loss_func is None
        bound = max(_TOLERANCE, 2 * torch.finfo(whole.dtype).eps) * abs(float(whole))
        fit = []
        for kind in (self._kind,) if self._kind is not None else KINDS if usual else ():
            found = kind(*outputs)
            if found is not None and not abs(float(found[0].sum() / found[1].sum()) - float(whole)) > bound:
                fit.append(kind)
        if not fit:
            raise TypeError(
                f"the loss of {type(model).__name__} is not the mean of cross-entropies (or squared errors) of its logits and "
                "labels, so the loss of each example is not known: give compute_losses=, a function of (model, inputs) that "
                "returns one loss for each example, or their sums and weights"
            )
        self._kind = tokens if len(fit) > 1 and not self._shifts(model, inputs) else fit[0]

    def _shifts(self, model: nn.Module, inputs: Any) -> bool:
        """Whether labels are those of next tokens: then nothing is left of a batch whose first places alone have some."""
        labels = inputs["labels"]
        first = torch.full_like(labels, IGNORED)
        first[:, 0] = labels[labels != IGNORED][0]
        loss = float(self._compute_loss(model, dict(inputs) | {"labels": first}))
        return not (math.isfinite(loss) and loss)


def _no_labels(inputs: Any) -> bool:
    """Whether the labels of a batch are all left out, so that its loss says nothing."""
    labels = inputs.get("labels")
    return isinstance(labels, Tensor) and bool((labels == IGNORED).all())


def _outputs(model: nn.Module, inputs: Any) -> Any:
    """Logits and labels; None where there are none."""
    labels = inputs.get("labels")
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # from its labels
    passed = inputs if decodes else {name: value for name, value in inputs.items() if name != "labels"}
    logits = getattr(model(**passed), "logits", None)
    return (logits, labels) if isinstance(logits, Tensor) and isinstance(labels, Tensor) else None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the body runs, the model is in eval mode: dropout would tell the examples of two passes, or of two copies, apart."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
