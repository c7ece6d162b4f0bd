"""Settings of the Trainer for zeroth-order training: the Trainer's own, the method's, and what does not go together."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import require
from ...kernels.checks import check_number
from ...model.backward import CHECKPOINTING_IS_IN_VAIN
from ...model.config import PatchConfig, check_names
from ...optim.steps import BY_EXAMPLE, StepSettings
from ..methods import METHODS, ZEROTH_ORDER

require("accelerate")
TrainingArguments = require("transformers").TrainingArguments

_DEFAULT_OPTIM = TrainingArguments.__dataclass_fields__["optim"].default
_LOW_RANK = ("rank", "interval", "scaling")


def check_method_name(method: Any) -> None:
    """Raises ValueError unless it is the name of a zeroth-order method."""
    if method not in ZEROTH_ORDER:
        raise ValueError(f"method is one of {', '.join(map(repr, ZEROTH_ORDER))}, not {method!r}")


def check_method_options(method: str, options: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError if one of the options belongs to other methods.

    Args:
        method: the name of a zeroth-order method.
        options: only what was given.
    """
    for name in _LOW_RANK:
        if name in options and name not in ZEROTH_ORDER[method].uses:
            raise ValueError(f"method={method!r} has no {name}: leave it out")
    if "momentum" in options:
        momentum = options["momentum"]
        check_number("momentum", momentum, low=0.0, high=1.0)
        other = ZEROTH_ORDER[method].with_momentum(float(momentum))
        if other != method:
            way_out = f"use method={other!r}" if other in ZEROTH_ORDER else "leave it out"
            raise ValueError(f"method={method!r} with momentum={float(momentum):g}: {way_out}")


@dataclasses.dataclass
class ZOArguments(TrainingArguments):  # type: ignore[misc, valid-type]
    """``TrainingArguments`` with the settings of zeroth-order methods.

    Weight decay, batches, evaluation, logging and checkpoints are those of ``TrainingArguments``. What the settings of the method
    mean is said by :class:`lozo_kernels.LOZO`, :class:`lozo_kernels.PatchConfig` and the help of each field.

    Raises:
        ValueError: a setting is unknown or out of range, or contradicts training without gradients.
    """

    method: str = dataclasses.field(default="lozo", metadata={"help": ", ".join(ZEROTH_ORDER)})
    rank: int | None = dataclasses.field(default=None, metadata={"help": "columns of U and V; None: 2, agzo-split 4, zo-muon 64"})
    interval: int | None = dataclasses.field(default=None, metadata={"help": "steps between draws of V; None: 50, of zo-muon 100"})
    scaling: str | None = dataclasses.field(default=None, metadata={"help": "where 1/r goes: paper, card or published"})
    eps: float = dataclasses.field(default=1e-3, metadata={"help": "scale of the perturbation"})
    momentum: float | None = dataclasses.field(default=None, metadata={"help": "beta; None: 0.9 for lozo-m and mezo-m"})
    directions: int | None = dataclasses.field(
        default=None, metadata={"help": "directions per step; None: 1, of zo-muon 4, of agzo-split 8, the parts of a batch"}
    )
    evaluation: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "of a step's points: sequential, batched in one forward pass, or split: each direction on its own part of the "
            "batch; None: sequential, of agzo-split split"
        },
    )
    two_sided: bool | None = dataclasses.field(
        default=None, metadata={"help": "(F(+) - F(-)) / (2 eps), or (F(+) - F) / eps; None: only zo-muon's are one-sided"}
    )
    directions_law: str = dataclasses.field(default="normal", metadata={"help": "of dense directions: normal or rademacher"})
    normalise: str | None = dataclasses.field(default=None, metadata={"help": "divide c by its spread or by a running scalar"})
    placement: str | None = dataclasses.field(
        default=None, metadata={"help": "inplace, probe or auto; None: inplace, of agzo-split probe"}
    )
    side: str = dataclasses.field(default="auto", metadata={"help": "of a probe: auto, activation, scratch or copy"})
    rounding: str = dataclasses.field(default="nearest", metadata={"help": "of updates in half precision: nearest or stochastic"})
    include: list[str] | None = dataclasses.field(default=None, metadata={"help": "patterns of parameters to train"})
    exclude: list[str] | None = dataclasses.field(default=None, metadata={"help": "patterns of parameters to leave alone"})
    keep_factors: bool = dataclasses.field(default=False, metadata={"help": "remember what a probe learned, for export_lora"})
    backend: str | None = dataclasses.field(default=None, metadata={"help": "kernels; None: the best of the device"})
    zo_seed: int = dataclasses.field(default=0, metadata={"help": "seed of the directions; seed is that of data and dropout"})
    max_nonfinite: int = dataclasses.field(default=10, metadata={"help": "steps in a row without a finite loss before an error"})
    learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "None: that of large models, 1e-6, of subzero, agzo and agzo-split 1e-7, of zo-muon 1e-2"}
    )
    lr_scheduler_type: str = dataclasses.field(default="constant", metadata={"help": "constant in the papers"})
    max_grad_norm: float = dataclasses.field(default=0.0, metadata={"help": "0: there is no gradient to clip"})

    def __post_init__(self) -> None:
        self._check_method()
        if self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} would clip the projected gradient, not a gradient's norm: leave it out"
            )
        check_arguments(self)
        stop_checkpointing(self)
        if self.optim != _DEFAULT_OPTIM or self.optim_args:
            raise ValueError(f"optim={str(self.optim)!r} is not used: the optimiser follows from method={self.method!r}")
        super().__post_init__()

    def _check_method(self) -> None:
        check_method_name(self.method)
        own = {name: getattr(self, name) for name in (*_LOW_RANK, "momentum")}
        check_method_options(self.method, {name: value for name, value in own.items() if value is not None})
        row = ZEROTH_ORDER[self.method]
        StepSettings(**row.step_defaults | self.optimizer_options())
        PatchConfig(estimator=row.estimator, **self.patch_options())
        self._check_evaluation()
        if self.learning_rate is None:
            self.learning_rate = row.lr

    def _check_evaluation(self) -> None:
        if self.by_example and self._chosen("placement") == "inplace":
            evaluation = self._chosen("evaluation")
            raise ValueError(f"evaluation={evaluation!r} needs placement='probe': weights that are moved can be at one point only")
        size, directions = self.per_device_train_batch_size, self._chosen("directions")
        if self.splits and size % directions:
            raise ValueError(
                f"directions={directions}: it divides per_device_train_batch_size, {size}, into equal parts, each with a "
                "direction of its own"
            )

    def _chosen(self, name: str) -> Any:
        """A setting, or the default that its method has."""
        value = getattr(self, name)
        return getattr(METHODS[self.method], name) if value is None else value

    @property
    def by_example(self) -> bool:
        """Whether evaluations need the loss of each example."""
        return self._chosen("evaluation") in BY_EXAMPLE

    @property
    def splits(self) -> bool:
        """Whether each part of a batch has a direction of its own."""
        return METHODS[self.method].splits(self._chosen("evaluation"))

    def patch_options(self) -> dict[str, Any]:
        """Arguments of :func:`lozo_kernels.patch`."""
        names = ("side", "rounding", "include", "exclude", "keep_factors", "backend", "directions_law")
        options = {name: getattr(self, name) for name in names} | {"seed": self.zo_seed}
        options["placement"] = self._chosen("placement")
        return options | {name: getattr(self, name) for name in _LOW_RANK if getattr(self, name) is not None}

    def optimizer_options(self) -> dict[str, Any]:
        """Arguments of the optimiser, without those of its groups."""
        names = ("eps", "max_nonfinite", "normalise", "directions", "two_sided", "evaluation")
        options = {name: value for name in names if (value := getattr(self, name)) is not None}
        momentum = ZEROTH_ORDER[self.method].momentum if self.momentum is None else self.momentum
        return options | ({"momentum": momentum} if momentum else {})


def _with_suggestions(made: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` of a dataclass whose error for a mistyped option says which was meant."""

    @functools.wraps(made)
    def init(self: Any, *args: Any, **named: Any) -> None:
        check_names(type(self).__name__, named, [field.name for field in dataclasses.fields(self) if field.init])
        made(self, *args, **named)

    return init


ZOArguments.__init__ = _with_suggestions(ZOArguments.__init__)  # type: ignore[method-assign]


def check_arguments(args: Any) -> None:
    """Raises ValueError for settings of a Trainer that make no sense without back-propagation or cannot be served."""
    if args.fsdp:
        raise ValueError("fsdp shards the model, which this loop cannot train: leave it out, or write a loop (docs/probe.md)")
    if args.deepspeed:
        raise ValueError("deepspeed brings an optimiser and a backward pass of its own: leave it out")


def stop_checkpointing(args: Any) -> None:
    """Switches gradient checkpointing off in a Trainer's settings, with a warning. TRL's have it on by default."""
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if getattr(args, name, None)]
    for name in names:  # transformers has both for a while
        setattr(args, name, False)
    if names:
        warnings.warn(f"{names[0]} was switched off: {CHECKPOINTING_IS_IN_VAIN}", stacklevel=4)
