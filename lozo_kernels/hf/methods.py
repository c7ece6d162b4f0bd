"""The training methods by name: one row each, from which the command, the Trainer and the planner know them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..optim.methods import AGZO, GRZO, LOZO, OPTIMIZERS, MeZO, SubZero, ZOMuon
from ..optim.optimizer import ZerothOrderOptimizer

_DENSE = (
    *("eps", "find_eps", "directions", "directions_law", "one_sided", "evaluation", "normalise"),
    *("placement", "backend", "momentum"),
)
_LOW_RANK = (*_DENSE, "rank", "interval", "scaling")
_SUBSPACE = tuple(name for name in _LOW_RANK if name not in ("momentum", "scaling"))
_GUIDED = tuple(name for name in _LOW_RANK if name != "momentum")
_MUON = tuple(name for name in _SUBSPACE if name != "normalise")
_PER_EXAMPLE = tuple(name for name in _LOW_RANK if name not in ("momentum", "one_sided", "evaluation", "placement", "find_eps"))
_TRAINING = (
    *("steps", "k_shot", "lr", "lr_schedule", "weight_decay", "eval_every", "compare_steps", "parallel", "num_train_epochs"),
    *("gradient_accumulation_steps", "warmup_steps", "lr_scheduler_kwargs", "report_to", "save_steps", "save_total_limit"),
    *("peft", "push_to_hub"),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the command line.

    Attributes:
        label: its name in the tables of papers.
        kind: "zeroth-order", "forward-gradient", "first-order", or "evaluation" for one that trains nothing.
        optimizer: its class, if it is zeroth-order.
        uses: those of the settings that not all methods have which it has.
        momentum: default of beta, 0 for a method without.
        lr: default learning rate, of large models.
        embedded_lr: default learning rate of the embedded model, which is four to five orders of magnitude smaller than theirs;
            None: it finds itself.
        lr_schedule: default schedule (LOZO's paper, section 5: constant for LOZO and MeZO, linear for fine-tuning).
        finds_lr: ``lr="auto"`` finds its learning rate.
        rank, interval, directions, one_sided, evaluation, placement: defaults of these settings, for methods that have them.
        forwards: forward passes of a step with one direction on two sides.
        published: the published code has this method, so that it can be timed beside it.
    """

    name: str
    label: str
    kind: str
    optimizer: type[ZerothOrderOptimizer] | None = None
    uses: tuple[str, ...] = ()
    momentum: float = 0.0
    lr: float = 1e-6
    embedded_lr: float | None = 3e-4
    lr_schedule: str = "constant"
    finds_lr: bool = True
    rank: int = 2
    interval: int = 50
    directions: int = 1
    one_sided: bool = False
    evaluation: str = "sequential"
    placement: str = "inplace"
    forwards: int = 2
    published: bool = False

    @property
    def trains(self) -> bool:
        """Whether it changes weights."""
        return self.kind != "evaluation"

    @property
    def per_example(self) -> bool:
        """Whether each part of a batch has a direction of its own, for which the loss of each example is needed."""
        return self.optimizer is GRZO

    @property
    def low_rank(self) -> bool:
        """Whether its directions have a rank, and a factor that is kept for an interval."""
        return "rank" in self.uses

    @property
    def estimator(self) -> str:
        """How :class:`lozo_kernels.PatchConfig` calls the directions of a zeroth-order method."""
        assert self.optimizer is not None
        return self.optimizer.estimator

    @property
    def step_defaults(self) -> dict[str, Any]:
        """Defaults of settings of its steps, as an optimiser calls them."""
        return {"directions": self.directions, "two_sided": not self.one_sided, "evaluation": self.evaluation}

    @property
    def foreign(self) -> frozenset[str]:
        """The settings of other methods, which mean nothing to this one."""
        others = {*_LOW_RANK, "num_shots"} - set(self.uses)
        return frozenset(others if self.trains else others | set(_TRAINING))

    def splits(self, evaluation: str) -> bool:
        """Whether each part of a batch has a direction of its own."""
        return self.per_example or evaluation == "split"

    def passes(self, directions: int, one_sided: bool, evaluation: str) -> int:
        """Forward passes of a step with so many directions, which share F(0) if they are one-sided, and a batch if each is of its
        own examples."""
        if self.splits(evaluation):
            return self.forwards
        return directions + 1 if one_sided else self.forwards * directions

    def with_momentum(self, momentum: float) -> str:
        """Name of the method that this one is with a beta: LOZO and MeZO have another name with momentum than without."""
        if (momentum > 0) == (self.momentum > 0):
            return self.name
        return self.name + "-m" if momentum > 0 else self.name.removesuffix("-m")


def _first_order(name: str, label: str, lr: float, embedded_lr: float, uses: tuple[str, ...] = ()) -> Method:
    return Method(name, label, "first-order", None, uses, 0.0, lr, embedded_lr, lr_schedule="linear", forwards=1)


class _Methods(Mapping[str, Method]):
    """Methods by name: those of a table, and every estimator that was registered (:func:`lozo_kernels.register_estimator`)."""

    def __init__(self, *methods: Method, hidden: str | None = None) -> None:
        self.table = {method.name: method for method in methods}
        self._known = {hidden, *(method.estimator for method in methods if method.optimizer is not None)}

    def __getitem__(self, name: str) -> Method:
        return self.table[name] if name in self.table else self._registered()[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.table
        yield from self._registered()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _registered(self) -> dict[str, Method]:
        found = {name: kind for name, kind in OPTIMIZERS.items() if name not in self._known and name not in self.table}
        return {
            name: Method(name, kind.__name__, "zeroth-order", kind, _SUBSPACE, embedded_lr=None) for name, kind in found.items()
        }


METHODS = _Methods(
    *(
        Method("lozo", "LOZO", "zeroth-order", LOZO, _LOW_RANK, published=True),
        Method("lozo-m", "LOZO-M", "zeroth-order", LOZO, _LOW_RANK, momentum=0.9, published=True),
        Method("mezo", "MeZO", "zeroth-order", MeZO, _DENSE, published=True),
        Method("mezo-m", "MeZO-M", "zeroth-order", MeZO, _DENSE, momentum=0.9, published=True),
        Method("subzero", "SubZero", "zeroth-order", SubZero, _SUBSPACE, lr=1e-7),
        Method("agzo", "AGZO", "zeroth-order", AGZO, _GUIDED, lr=1e-7, embedded_lr=1e-4),
        Method(
            *("agzo-split", "AGZO (split)", "zeroth-order", AGZO, _GUIDED, 0.0, 1e-7, 1e-4),
            rank=4,
            directions=8,
            evaluation="split",
            placement="probe",
        ),
        Method(
            *("zo-muon", "ZO-Muon", "zeroth-order", ZOMuon, _MUON, 0.0, 1e-2, 1e-2),
            finds_lr=False,
            rank=64,
            interval=100,
            directions=4,
            one_sided=True,
        ),
        Method(*("grzo", "GRZO", "zeroth-order", GRZO, _PER_EXAMPLE, 0.0, 1e-3, 5e-3), finds_lr=False, directions=8),
        Method("forward-grad", "Forward-Grad", "forward-gradient", uses=("backend",), forwards=1),
        _first_order("ft", "FT", 1e-5, 1e-3),
        _first_order("ft-adamw", "FT (AdamW)", 1e-5, 1e-3),
        _first_order("ft-sgd", "FT (SGD)", 1e-3, 0.03, uses=("momentum",)),
        _first_order("ft-lora", "FT-LoRA", 1e-4, 1e-2),
        Method("zero-shot", "zero-shot", "evaluation", forwards=0),
        Method("icl", "ICL", "evaluation", uses=("num_shots",), forwards=0),
    )
)

ZEROTH_ORDER = _Methods(
    *(m for m in METHODS.values() if m.optimizer is not None and not m.per_example),
    hidden=GRZO.estimator,
)
"""Those that train with forward passes only, which the Trainer has."""
EVALUATIONS = tuple(name for name, method in METHODS.items() if not method.trains)
"""Those that score a model as it is."""

DEFAULTS = ("rank", "interval", "directions", "one_sided", "evaluation", "placement")
"""The settings whose defaults are those of the method."""


def take_defaults(settings: Any) -> None:
    """Gives those of :data:`DEFAULTS` that are None in a dataclass of settings the values of its method. An unknown method, which
    is somebody else's error, has those of LOZO."""
    known = METHODS.get(settings.method) if isinstance(settings.method, str) else None
    for name in DEFAULTS:
        if getattr(settings, name, 0) is None:
            object.__setattr__(settings, name, getattr(known or METHODS["lozo"], name))
