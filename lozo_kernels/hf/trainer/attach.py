"""Zeroth-order training in a Trainer that exists already, whatever computes its loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from ...model.backward import Backward
from ...model.config import OPTIONS, check_names
from ...model.handle import Handle
from ...model.patching import patch
from ...optim.optimizer import KEYWORDS, ZerothOrderOptimizer
from ...optim.steps import BY_EXAMPLE
from ..methods import ZEROTH_ORDER
from .arguments import check_arguments, check_method_name, check_method_options, stop_checkpointing
from .example_losses import ExampleLosses
from .projecting import ProjectedLoss, ProjectedLosses

_CALL_POINTS = ("compute_loss", "training_step", "create_optimizer", "get_decay_parameter_names")


class Attachment:
    """What :func:`attach` made.

    Attributes:
        trainer: the trainer.
        optimizer: its optimiser.
        handle: the patch on its model.
    """

    def __init__(self, trainer: Any, optimizer: ZerothOrderOptimizer, compute_losses: Callable[..., Any] | None = None) -> None:
        self.trainer = trainer
        self.optimizer = optimizer
        self.handle = optimizer.handle
        self._before = {name: trainer.__dict__.get(name) for name in ("compute_loss", "save_model", "get_train_dataloader")}
        losses = ExampleLosses(trainer, compute_losses)
        trainer.compute_loss = projected(trainer, optimizer, trainer.compute_loss, losses)
        trainer.save_model = self._settled(trainer.save_model)
        if optimizer.stepper.parts > 1:
            trainer.get_train_dataloader = functools.partial(whole_batches, trainer, trainer.get_train_dataloader)
        trainer.optimizer = optimizer

    def restore(self) -> None:
        """Gives the trainer its own loss back and takes the patch off; the trained weights stay. A second call does nothing."""
        if isinstance(self.trainer.__dict__.get("compute_loss"), (ProjectedLoss, ProjectedLosses)):
            for name, before in self._before.items():
                if before is None:
                    self.trainer.__dict__.pop(name, None)
                else:
                    self.trainer.__dict__[name] = before
            self.trainer.optimizer = None
        self.handle.restore()

    def _settled(self, save: Callable[..., Any]) -> Callable[..., Any]:
        """Saving that first merges what a probe learned, on every process: all go on with the model that one of them writes."""

        @functools.wraps(save)
        def settle_and_save(*args: Any, **kwargs: Any) -> Any:
            self.handle.merge()
            return save(*args, **kwargs)

        return settle_and_save


def attach(
    trainer: Any, *, method: str = "lozo", compute_losses: Callable[[nn.Module, Any], Any] | None = None, **options: Any
) -> Attachment:
    """Has a ``transformers.Trainer``, or a subclass of it, train without gradients. Call it before ``trainer.train()``.

    Its ``compute_loss`` is evaluated at the points of each step, so the loss may be computed anywhere: label smoothing,
    ``compute_loss_func``, an overridden ``compute_loss``, TRL's trainers.

    Args:
        trainer: it has no optimiser yet; learning rate, schedule and weight decay are those of its arguments.
        method: "lozo", "lozo-m", "agzo", "agzo-split", "mezo", "mezo-m", "subzero" or "zo-muon".
        compute_losses: as for :class:`~lozo_kernels.hf.ZOTrainer`.
        options: settings of the optimiser (:class:`lozo_kernels.LOZO`) and of :func:`lozo_kernels.patch`.

    Returns:
        The attachment, whose ``restore()`` undoes it.

    Raises:
        TypeError: not a trainer, or an unknown option; nothing was changed.
        ValueError: a setting of the trainer contradicts training without gradients; nothing was changed.
        RuntimeError: the model is patched already.
    """
    missing = [name for name in _CALL_POINTS if not callable(getattr(trainer, name, None))]
    if missing or not isinstance(getattr(trainer, "model", None), nn.Module):
        lacking = ", ".join(missing) or "a model"
        raise TypeError(f"attach() takes a transformers.Trainer with a model; {type(trainer).__name__} lacks {lacking}")
    check_method_name(method)
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError("the trainer has an optimiser already; attach() gives it another: make the trainer without one")
    if trainer.model_init is not None:
        raise ValueError("the trainer makes its model when it trains (model_init); attach() needs a model: use ZOTrainer")
    check_trainer(trainer)
    check_functions(options.get("evaluation", ZEROTH_ORDER[method].evaluation) in BY_EXAMPLE, compute_losses)
    stop_checkpointing(trainer.args)
    optimizer = make_optimizer(trainer, trainer.model, method, options)
    return Attachment(trainer, optimizer, compute_losses)


def projected(
    trainer: Any,
    optimizer: ZerothOrderOptimizer,
    compute_loss: Callable[..., Any],
    losses: ExampleLosses,
    timed: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call,
) -> ProjectedLoss | ProjectedLosses:
    """What a trainer's ``compute_loss`` becomes, for the evaluations of its optimiser.

    Args:
        losses: of examples, where evaluations need them.
        timed: gets what makes a forward pass and gives what is called in its place.
    """
    drive = drive_on(optimizer.handle)
    if not optimizer.by_example:
        return ProjectedLoss(drive, timed(compute_loss))
    return ProjectedLosses(drive, compute_loss, trainer, losses, timed)


def check_functions(by_example: bool, compute_losses: Any, compute_objective: Any = None) -> None:
    """Raises TypeError or ValueError if functions of the user are none, or are not for these evaluations."""
    for name, function in (("compute_objective", compute_objective), ("compute_losses", compute_losses)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} is a function of (model, inputs), not {type(function).__name__}")
    if by_example and compute_objective is not None:
        raise ValueError("evaluation='split' and 'batched' need the loss of each example: give compute_losses in its place")
    if compute_losses is not None and not by_example:
        raise ValueError("compute_losses goes with evaluation='split' or 'batched': leave it out, or give one of them")


def whole_batches(trainer: Any, make: Callable[[], Any]) -> Any:
    """A loader of train batches without one at the end of an epoch that does not divide as the others do. Evaluations keep theirs.

    Raises:
        ValueError: there is none.
    """
    args = trainer.args
    before, args.dataloader_drop_last = args.dataloader_drop_last, True
    try:
        loader = make()
    finally:
        args.dataloader_drop_last = before
    if hasattr(getattr(loader, "dataset", None), "__len__") and not len(loader):
        raise ValueError(f"the {len(loader.dataset)} train examples are less than one batch: lower per_device_train_batch_size")
    return loader


def check_trainer(trainer: Any) -> None:
    """Raises ValueError if a trainer's settings cannot be served."""
    check_arguments(trainer.args)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError("accelerate is set up for FSDP or DeepSpeed, whose models this loop cannot train: set it up without")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"the Trainer would copy the model to {trainer.args.n_gpu} GPUs for each call (DataParallel): start one process per "
            "GPU (torchrun), or show it one (CUDA_VISIBLE_DEVICES)"
        )


def make_optimizer(trainer: Any, model: nn.Module, method: str, options: dict[str, Any]) -> ZerothOrderOptimizer:
    """The optimiser of a trainer on its model, which is patched, with the parameter groups that the Trainer makes.

    Raises:
        TypeError, ValueError, RuntimeError: an option or the model does not fit; the model is untouched.
    """
    row = ZEROTH_ORDER[method]
    assert row.optimizer is not None
    cls = row.optimizer
    check_names(f"a trainer with {cls.__name__}", options, [name for name in KEYWORDS if name not in ("params", "drive")])
    check_method_options(method, options)
    rest = {name: value for name, value in options.items() if name not in OPTIONS}
    rates = {"lr": trainer.args.learning_rate, "weight_decay": trainer.args.weight_decay}
    rest = rates | row.step_defaults | rest
    if row.momentum:
        rest.setdefault("momentum", row.momentum)
    chosen: dict[str, Any] = {"placement": row.placement} | ({"rank": row.rank, "interval": row.interval} if row.low_rank else {})
    chosen |= {name: value for name, value in options.items() if name in OPTIONS}
    handle = patch(model, estimator=row.estimator, drive="loss", **chosen)
    try:
        optimizer = cls(handle, _groups(trainer, handle, rest["weight_decay"]), **rest)
        accelerator = trainer.accelerator
        if accelerator.num_processes > 1:
            drive_on(handle).average_when(lambda: accelerator.sync_gradients)
    except BaseException:
        handle.restore()
        raise
    return optimizer


def _groups(trainer: Any, handle: Handle, weight_decay: float) -> list[dict[str, Any]] | None:
    """Parameter groups as the Trainer makes them: biases and norms do not decay. None where nothing does."""
    if not weight_decay:
        return None
    names = trainer.get_decay_parameter_names(handle.model)
    decaying = {id(p) for name, p in handle.model.named_parameters() if name in names}
    groups = [
        {"params": [p for p in handle.parameters if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in handle.parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def drive_on(handle: Handle) -> Backward:
    """The drive of a handle that was patched with one."""
    drive = handle.backward
    assert drive is not None
    return drive
