"""What LOZO is compared with: fine-tuning by gradients, all weights or LoRA, and forward-mode gradients, as drivers of the loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from ...kernels import ops
from ...kernels.calls import Draw
from ...kernels.table import TensorTable
from ...model.patching import patch
from ..models.adapters import add_adapters
from .drivers import Baseline, Closure


class FirstOrder(Baseline):
    """Gradients by backward, and one of torch's optimisers; one forward and one backward pass a step.

    The model stays in evaluation mode as for the other methods, so there is no dropout.
    """

    def step(self, closures: Sequence[Closure], inputs: Any = None) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        shares = []
        try:
            with torch.enable_grad():
                for closure in closures:
                    share = closure() / len(closures)
                    share.backward()
                    shares.append(share.detach())
            loss = torch.stack(shares).sum()
            return self.finish_step(loss, loss.new_zeros(0, dtype=torch.float64), self.inner.step)
        finally:
            self.inner.zero_grad(set_to_none=True)


class LoRA(FirstOrder):
    """AdamW on low-rank adapters (Hu et al., 2022) that PEFT puts into the model, which is otherwise frozen; merged by ``close``.

    Args:
        model: a model of transformers. A classification head is trained in full beside the adapters, as PEFT does for such models.
        lr, weight_decay: settings of AdamW.
        seed: seed of the adapters' first weights.

    Raises:
        InputError: PEFT is not installed, or the model has no linear layer to adapt.
    """

    def __init__(self, model: nn.Module, *, lr: float, weight_decay: float, seed: int) -> None:
        self._model, self._flags = model, {name: p.requires_grad for name, p in model.named_parameters()}
        self._peft = add_adapters(model, seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        super().__init__(torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay))

    def close(self) -> None:
        self._peft.merge_and_unload()
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
        for name, p in self._model.named_parameters():
            p.requires_grad_(self._flags[name])


class ForwardGradient(Baseline):
    """Forward-mode gradients (Baydin et al., 2022): X <- (1 - lr * weight_decay) X - lr (dF . Z) Z, Z dense and Gaussian.

    One pass computes the loss and its derivative along Z. Z is that of :class:`~lozo_kernels.MeZO` with the same seed at
    the same step, whose estimate goes to this one as eps goes to 0.

    Args:
        model: a model whose operations all have forward derivatives; attention is computed without fused kernels, which have none.
        lr, weight_decay: their values at the first step; a schedule may change them in the groups.
        seed: seed of the directions.
        backend: name of the kernels' backend; None for the best of the device.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`~lozo_kernels.model.patching.patch`.
    """

    def __init__(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, seed: int = 0, backend: str | None = None
    ) -> None:
        handle = patch(model, estimator="dense", seed=seed, backend=backend)
        # The optimiser holds the groups only.
        super().__init__(torch.optim.SGD(handle.parameters, lr=lr, weight_decay=weight_decay), handle)
        self._caller = _Caller(model)
        self._names = {id(p): name for name, p in self._caller.named_parameters()}

    @torch.no_grad()
    def step(self, closures: Sequence[Closure], inputs: Any = None) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        tangents = self._direction()
        parameters = {name: p.detach() for name, p in self._caller.named_parameters() if name in tangents}

        def loss_at(values: dict[str, Tensor]) -> Tensor:
            return functional_call(self._caller, values, (closures,))  # type: ignore[no-any-return]

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss, c = jvp(loss_at, (parameters,), (tangents,))  # type: ignore[misc]
        del tangents
        rates = {name: self.param_groups[0][name] for name in ("lr", "weight_decay")}
        return self.finish_step(loss, c.reshape(1), lambda: self.handle.update_(self.steps_done, c.to(torch.float64), **rates))

    def _direction(self) -> dict[str, Tensor]:
        """Z of this step by the names of the parameters, in their dtypes."""
        found = {}
        for group in self.handle.groups:
            z = TensorTable([torch.zeros_like(x) for x in group.table.x], group.table.tensor_ids)
            ops.dense_update_(z, seed=self.handle.config.seed, draws=[Draw(self.steps_done)], scales=1.0, backend=group.backend)
            for value, i in zip(z.x, group.index.tolist(), strict=True):
                parameter = self.handle.parameters[i]
                found[self._names[id(parameter)]] = value.reshape(parameter.shape)
        return found


class _Caller(nn.Module):
    """Calls closures over a model, so that ``functional_call`` reaches the model's parameters inside of them; their mean."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, closures: Sequence[Closure]) -> Tensor:
        return torch.stack([one() for one in closures]).mean()
