"""What LOZO is compared with: fine-tuning by gradients, all weights or LoRA, and forward-mode gradients, as drivers of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ...errors import InputError, require
from ...kernels import ops
from ...kernels.calls import Draw
from ...kernels.table import TensorTable
from ...model.patching import patch
from .drivers import Closure, LossWatch, StepResult

LORA_RANK = 8
LORA_ALPHA = 16
"""As MeZO's and LOZO's papers have LoRA: r = 8 and alpha = 16 on the attention projections that PEFT knows for an architecture."""


class FirstOrder:
    """Gradients by backward, and one of torch's optimisers; one forward and one backward pass a step.

    The model stays in evaluation mode as for the other methods, so there is no dropout.

    Args:
        optimizer: of the parameters to train.
        model: whose parameters they are.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.backends: list[str] = []
        self.info: StepResult | None = None
        self.steps_done = 0
        self._watch = LossWatch()

    def step(self, closure: Closure) -> Tensor:
        """A gradient step; see :class:`~lozo_kernels.hf.loop.drivers.Driver`."""
        with torch.enable_grad():
            loss = closure()
            loss.backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        good = False
        try:
            good = self._watch.finite(loss, self.steps_done)
            if good:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.info = StepResult(self.steps_done, loss, torch.zeros(0), skipped=not good)
            self.steps_done += 1
        return loss

    def close(self) -> None:
        """Drops gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class LoRA(FirstOrder):
    """AdamW on low-rank adapters (Hu et al., 2022) that PEFT puts into the model, which is otherwise frozen; merged by ``close``.

    Args:
        model: of transformers. A classification head is trained in full beside the adapters, as PEFT does for such models.
        lr, weight_decay: of AdamW.
        seed: of the adapters' first weights.

    Raises:
        InputError: PEFT is not installed, or the model has no linear layer to adapt.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, seed: int) -> None:
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self._peft = _adapted(model, seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(model, torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay))

    def close(self) -> None:
        """Adds the adapters' products to the weights and removes them."""
        super().close()
        self._peft.merge_and_unload()
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags[name])


def _adapted(model: nn.Module, seed: int) -> Any:
    """Adapters in the model, from PEFT's table of architectures, or on all linear layers of one that it does not know."""
    peft = require("peft", extra="peft")
    kind = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else None
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        for targets in (None, "all-linear"):
            config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets, task_type=kind)
            try:
                return peft.get_peft_model(model, config)
            except ValueError as e:
                error = e
    finally:
        torch.set_rng_state(state)
    raise InputError(f"this model cannot be trained by ft-lora: {error}")


class ForwardGradient:
    """Forward-mode gradients (Baydin et al., 2022): X <- (1 - lr * weight_decay) X - lr (dF . Z) Z, Z dense and Gaussian.

    One pass computes the loss and its derivative along Z. Z is that of :class:`~lozo_kernels.MeZO` with the same seed at
    the same step, whose estimate goes to this one as eps goes to 0.

    Args:
        model: a model whose operations all have forward derivatives; attention is computed without fused kernels, which have none.
        lr, weight_decay: constants or what a schedule makes of them.
        seed: of the directions.
        backend: of the kernels; None for the best of the device.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`~lozo_kernels.model.patching.patch`.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, seed: int = 0, backend: str | None = None
    ) -> None:
        self.handle = patch(model, estimator="dense", seed=seed, backend=backend)
        self.optimizer = torch.optim.SGD(self.handle.parameters, lr=lr, weight_decay=weight_decay)  # holds the groups only
        self.backends: list[str] = sorted({p.backend for p in self.handle.report().parameters if p.backend})
        self.info: StepResult | None = None
        self.steps_done = 0
        self._caller = _Caller(model)
        self._names = {id(p): name for name, p in self._caller.named_parameters()}
        self._watch = LossWatch()

    @torch.no_grad()
    def step(self, closure: Closure) -> Tensor:
        """One pass along Z; see :class:`~lozo_kernels.hf.loop.drivers.Driver`."""
        tangents = self._direction()
        parameters = {name: p.detach() for name, p in self._caller.named_parameters() if name in tangents}

        def loss_at(values: dict[str, Tensor]) -> Tensor:
            return functional_call(self._caller, values, (closure,))  # type: ignore[no-any-return]

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss, c = jvp(loss_at, (parameters,), (tangents,))  # type: ignore[misc]
        del tangents
        good = False
        try:
            good = self._watch.finite(loss + c, self.steps_done)
            if good:
                group = self.optimizer.param_groups[0]
                self.handle.update_(self.steps_done, c.to(torch.float64), group["lr"], weight_decay=group["weight_decay"])
        finally:
            self.info = StepResult(self.steps_done, loss, c.reshape(1), skipped=not good)
            self.steps_done += 1
        return loss

    def close(self) -> None:
        """Takes the patch off."""
        self.handle.restore()

    def _direction(self) -> dict[str, Tensor]:
        """Z of this step by name, in the dtypes of the weights."""
        parameters = self.handle.parameters
        seed, draws = self.handle.config.seed, [Draw(self.steps_done)]
        found = {}
        for group in self.handle.groups:
            table = group.table
            z = TensorTable([torch.zeros_like(x) for x in table.x], table.tensor_ids)
            ops.dense_update_(z, seed=seed, draws=draws, scales=1.0, backend=group.backend)
            found.update(_named(z.x, [parameters[i] for i in group.index.tolist()], self._names))
        return found


def _named(values: Sequence[Tensor], parameters: Sequence[nn.Parameter], names: dict[int, str]) -> dict[str, Tensor]:
    return {names[id(p)]: z.reshape(p.shape) for z, p in zip(values, parameters, strict=True)}


class _Caller(nn.Module):
    """Calls a closure over a model, so that ``functional_call`` reaches the model's parameters inside of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, closure: Closure) -> Tensor:
        """What the closure returns."""
        return closure()
