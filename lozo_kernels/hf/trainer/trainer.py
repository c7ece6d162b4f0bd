"""The Hugging Face Trainer for zeroth-order methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import require
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.steps import StepInfo
from ..measure import Stopwatch
from ..methods import METHODS
from .arguments import ZOArguments
from .attach import check_functions, check_trainer, make_optimizer, projected, whole_batches
from .example_losses import ExampleLosses, evaluating
from .prospects import LOOKED_AT, Prospects, Rising, judges_of

Trainer = require("transformers").Trainer

Objective = Callable[[nn.Module, Any], Any]
"""(model, inputs) -> a number to minimise, or to maximise if the callable has a true attribute ``maximize``."""


class ZOTrainer(Trainer):  # type: ignore[misc, valid-type]
    """``transformers.Trainer`` that trains with forward passes only.

    Everything around the step is the Trainer's: data, evaluation, callbacks, schedules, checkpoints, resuming, several processes.
    Logs have ``projected_gradient``, ``loss_plus`` and ``loss_minus`` of the last step, ``skipped`` updates so far, and the mean
    time of a step since the last log, ``step_ms``, of which ``forwards_ms`` in forward passes and ``weights_ms`` in passes over
    the weights.

    Args:
        model, args, ...: as for the Trainer, ``args`` being :class:`ZOArguments`; no optimiser.
        compute_objective: what training minimises in place of the loss, any function of (model, inputs), called without a graph
            and in eval mode. With a true attribute ``maximize`` it is maximised: the F1 of generated text, say. Evaluation still
            has the loss.
        compute_losses: (model, inputs) -> the loss of each example, (examples,), or their (sums, weights), which
            ``evaluation="split"`` and ``"batched"`` need. None: the trainer finds out on the first batch which one it is,
            cross-entropy or squared error.

    Attributes:
        zo_optimizer: the optimiser once training has begun, however it is wrapped; None before.

    Raises:
        TypeError: ``args`` are not :class:`ZOArguments`, or what computes an objective or losses is not callable.
        ValueError: an optimiser was given, or a setting contradicts training without gradients.
    """

    optimizer: Any
    compute_loss: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *more: Any,
        compute_objective: Objective | None = None,
        compute_losses: Callable[[nn.Module, Any], Any] | None = None,
        **named: Any,
    ) -> None:
        args = ZOArguments() if args is None else args
        if not isinstance(args, ZOArguments):
            raise TypeError(f"ZOTrainer takes lozo_kernels.hf.ZOArguments, not {type(args).__name__}")
        given = inspect.signature(Trainer.__init__).bind(self, model, args, *more, **named).arguments
        if any(given.get("optimizers") or ()) or given.get("optimizer_cls_and_kwargs"):
            raise ValueError(f"ZOTrainer makes its optimiser from method={args.method!r}; to bring your own use the stock Trainer")
        check_functions(args.by_example, compute_losses, compute_objective)
        if compute_objective is not None and given.get("compute_loss_func") is not None:
            raise ValueError("compute_objective takes the place of the loss: leave compute_loss_func out")
        super().__init__(model, args, *more, **named)
        check_trainer(self)
        self.zo_objective = compute_objective  # hyperparameter_search() sets a compute_objective of its own
        self.zo_optimizer: ZerothOrderOptimizer | None = None
        self._example_losses = ExampleLosses(self, compute_losses)
        self._watch = Stopwatch(self.args.device)
        self._judges: list[Prospects | Rising] = []
        self._unseen: list[tuple[StepInfo, float]] = []
        self._parameters: int | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Patches the model and makes the optimiser of ``args.method``."""
        self._judges, self._unseen = [], []
        if self.optimizer is None:
            model = self.model if model is None else model
            options = self.args.patch_options() | self.args.optimizer_options()
            optimizer = make_optimizer(self, model, self.args.method, options)
            optimizer.register_step_pre_hook(lambda *_: self._watch.start("step"))
            optimizer.register_step_post_hook(lambda *_: self._watch.stop("step"))
            optimizer.register_step_post_hook(lambda *_: self._look())
            self.optimizer = self.zo_optimizer = optimizer
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """As the Trainer's, without a batch at the end of an epoch that has other parts than the others."""
        make = super().get_train_dataloader
        return whole_batches(self, make) if self.args.splits else make()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Evaluates a micro-batch at all points of the step; the Trainer's own step does the rest with what they give."""
        assert self.zo_optimizer is not None
        if self.zo_objective is not None or self._example_losses.given is not None:
            num_items_in_batch = None  # what an objective returns is a mean of its own
        loss = self.compute_loss if self.zo_objective is None else self._objective_loss
        evaluations = projected(
            self, self.zo_optimizer, loss, self._example_losses, functools.partial(self._watch.timed, "forwards")
        )
        # An attribute of the instance goes before the method, for as long as the step takes.
        self.compute_loss = self._watch.timed("evaluations", evaluations)
        try:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        finally:
            del self.compute_loss

    def save_model(self, *where: Any, **named: Any) -> None:
        """Saves as the Trainer does.

        What a probe learned is merged before, on every process and not only on the one that writes, so that all go on with the
        same model.
        """
        if self.zo_optimizer is not None:
            self.zo_optimizer.handle.merge()
        super().save_model(*where, **named)

    def restore(self) -> None:
        """Takes the patch off the model after training; the trained weights stay."""
        if self.zo_optimizer is not None:
            self.zo_optimizer.handle.restore()
            self.optimizer = None
            self.zo_optimizer = None

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        """Logs what the Trainer logs, and what is known of the last step."""
        info = None if self.zo_optimizer is None else self.zo_optimizer.info
        if "loss" in logs and info is not None:
            logs.pop("grad_norm", None)
            c = info.c.tolist()
            logs |= {"projected_gradient": c[0]} if len(c) == 1 else {f"projected_gradient_{d}": value for d, value in enumerate(c)}
            logs |= {"loss_plus": float(info.loss_plus.mean()), "loss_minus": float(info.loss_minus.mean())}
            logs |= {"skipped": int(info.skipped_total), **self._drain_times()}
        super().log(logs, *more, **named)

    def floating_point_ops(self, inputs: Any) -> int:
        """The operations of the forward passes that the step made; there is no backward pass."""
        main = getattr(self.model, "main_input_name", "input_ids")
        if self.zo_optimizer is None or main not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._parameters is None:
            self._parameters = self.model.num_parameters(exclude_embeddings=True)
        optimizer, method = self.zo_optimizer, METHODS[self.args.method]
        passes = method.passes(optimizer.directions, not optimizer.two_sided, optimizer.evaluation)
        return 2 * inputs[main].numel() * self._parameters * passes

    def _look(self) -> None:
        """Has the judges look at the steps, some at a time where reading their numbers waits for the device."""
        assert self.zo_optimizer is not None and self.zo_optimizer.info is not None
        self._unseen.append((self.zo_optimizer.info, float(self.zo_optimizer.param_groups[0]["lr"])))
        if not self.is_world_process_zero() or len(self._unseen) < (1 if self.args.device.type == "cpu" else LOOKED_AT):
            del self._unseen[:-LOOKED_AT]
            return
        if not self._judges:
            steps, way_out = self.state.max_steps, "Give a larger learning_rate"
            self._judges = judges_of(self.zo_optimizer, steps, "learning_rate", way_out)
        for info, lr in self._unseen:
            for judge in self._judges if not info.skipped else ():
                judge.look(info.step, float(info.loss), info.c.tolist(), lr)
        self._unseen.clear()

    def _drain_times(self) -> dict[str, float]:
        """Milliseconds per step since the last log."""
        steps = max(1, self._watch.count("step"))
        evaluations, updates, forwards = (1e3 * self._watch.seconds(n) / steps for n in ("evaluations", "step", "forwards"))
        self._watch.clear()
        return {"step_ms": evaluations + updates, "forwards_ms": forwards, "weights_ms": evaluations + updates - forwards}

    def _objective_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        objective = self.zo_objective
        assert objective is not None
        with evaluating(model):
            value = objective(self.accelerator.unwrap_model(model), inputs)
        value = -value if getattr(objective, "maximize", False) else value
        return (value, None) if return_outputs else value
