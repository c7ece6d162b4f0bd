"""What the adapters of all trainers share: replacing methods and giving them back, settings, and the settings of SGD optimisers."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ..model.config import PatchConfig
from ..model.passes import Scalar
from .listed import Pairs, Weights
from .streams import perturb_dense

COMPAT = (None, "published")

Method = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The choices of a user of :func:`accelerate_trainer`, whose arguments have the same names."""

    compat: str | None
    seed: int
    backend: str | None
    rounding: str


class TrainerAdapter:
    """Serves the methods of a trainer that touch weights by this library, until :meth:`restore`.

    Used as a context manager it restores at the end.

    Attributes:
        family: name of the trainer's family.
        trainer: the object that was given.
        served: names of the methods that are replaced now.
        notes: what a user should know of how the trainer is served.
    """

    family: ClassVar[str]
    notes: tuple[str, ...] = ()

    def __init__(self, trainer: Any, settings: Settings) -> None:
        self.trainer = trainer
        self.settings = settings
        self._replaced: list[tuple[Any, str, bool, Any]] = []
        self._restored = False
        self._called: set[str] = set()

    @property
    def served(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name, _, _ in self._replaced))

    def serve(self) -> None:
        """Replaces the trainer's methods. Called once, by :func:`accelerate_trainer`."""
        raise NotImplementedError

    def release(self) -> None:
        """Leaves in the trainer what its own methods need to go on. By default that is nothing."""

    def restore(self) -> None:
        """Gives every method back. The weights stay as they are. A second call does nothing.

        Warns if the trainer called none of them, or perturbed through them and updated in some other way.
        """
        if self._restored:
            return
        self._restored = True
        self._warn_of_what_was_not_called()
        for target, name, own, before in reversed(self._replaced):
            if own:
                setattr(target, name, before)
            else:
                delattr(target, name)
        self._replaced.clear()
        with torch.inference_mode(False), torch.no_grad():
            self.release()

    def __enter__(self) -> TrainerAdapter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:  # the run ended early, and says why itself
            self._called.update(self.served)
        self.restore()

    def _warn_of_what_was_not_called(self) -> None:
        updates = [name for name in self.served if "update" in name or "step" in name]
        if not self._called:
            which = "none of the methods that were served"
        elif updates and not self._called.intersection(updates):
            which = f"no served update ({', '.join(updates)}), although it perturbed with served methods"
        else:
            return
        warnings.warn(
            f"the {self.family} trainer called {which}: its steps are its own, and nothing was gained; look at the settings by "
            "which it chooses its steps, or at methods that a subclass replaces",
            stacklevel=3,
        )

    def _replace(self, name: str, method: Method, target: Any = None) -> None:
        """Replaces a method on the trainer's instance. The new one works in any gradient or inference mode that it is called in."""
        target = self.trainer if target is None else target
        original = getattr(target, name)

        @functools.wraps(original)
        def served(*args: Any, **kwargs: Any) -> Any:
            self._called.add(name)
            with torch.inference_mode(False), torch.no_grad():  # tensors made here outlive the call
                return method(*args, **kwargs)

        served.lozo_adapter = self  # type: ignore[attr-defined]
        self._replaced.append((target, name, name in vars(target), vars(target).get(name)))
        setattr(target, name, served)

    def _weights(self, estimator: str = "dense", rank: int = 1, interval: int = 50) -> Weights:
        """Makes the weights for the trainer's lists. Published code has no 1/r anywhere: its learning rate absorbs it."""
        s = self.settings
        config = PatchConfig(
            estimator, rank=rank, interval=interval, seed=s.seed, scaling="published", rounding=s.rounding, backend=s.backend
        )
        model = getattr(self.trainer, "model", None)
        return Weights(config, model if isinstance(model, nn.Module) else None)

    def _refuse(self, what: str) -> ValueError:
        return ValueError(f"this {self.family} trainer cannot be served: {what}")


class SeededAdapter(TrainerAdapter):
    """What serves the trainers whose ``zo_perturb_parameters`` moves weights along the dense direction of a seed.

    Attributes:
        _moved: the weights that are moved; not there with ``compat="published"``, which draws from torch's generator.
    """

    _moved: Weights

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        seed = t.zo_random_seed if random_seed is None else random_seed
        scale = scaling_factor * t.args.zo_eps
        if self.settings.compat == "published":
            perturb_dense(t.named_parameters_to_optim, seed, scale)
        else:
            self._moved.perturb(t.named_parameters_to_optim, seed, scale)


def learning_rate(trainer: Any) -> float:
    """The current learning rate of a trainer of transformers, which has it under a private name only."""
    return trainer._get_learning_rate()  # type: ignore[no-any-return]  # noqa: SLF001


@dataclasses.dataclass(frozen=True)
class SGD:
    """The settings of ``torch.optim.SGD`` for a list of parameters: one value each, or one for all."""

    lr: Scalar
    momentum: float
    weight_decay: Scalar

    @property
    def decay(self) -> Scalar | None:
        """1 - lr * weight_decay, or None without weight decay."""
        plain = not isinstance(self.weight_decay, torch.Tensor) and self.weight_decay == 0.0
        return None if plain else 1.0 - self.lr * self.weight_decay


def read_sgd(optimizer: Any, pairs: Pairs) -> SGD:
    """Returns the settings that an optimiser has now for the parameters of a list.

    Args:
        optimizer: a ``torch.optim.SGD``, also wrapped by accelerate, or a dict with one for each parameter.

    Raises:
        ValueError: it is another optimiser, or has a setting that an update along a regenerated direction cannot follow.
    """
    every = list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]
    groups: dict[int, dict[str, Any]] = {}
    for one in every:
        while hasattr(one, "optimizer"):
            one = one.optimizer
        if not isinstance(one, torch.optim.SGD):
            raise ValueError(
                f"the trainer's optimizer is {type(one).__name__}, which keeps state of the size of the weights; "
                "only torch.optim.SGD can be served, or give compat='published', which leaves the update to the optimizer"
            )
        for group in one.param_groups:
            groups |= dict.fromkeys(map(id, group["params"]), group)
    missing = [name for name, p, *_ in pairs if id(p) not in groups]
    if missing:
        raise ValueError(f"the trainer's optimizer does not have {missing[0]!r}, which is in the list of parameters to train")
    mine = [groups[id(p)] for p in {id(p): p for _, p, *_ in pairs}.values()]
    for word in ("dampening", "nesterov", "maximize"):
        if any(group.get(word) for group in mine):
            raise ValueError(f"the trainer's SGD has {word}, which is not served: set it to its default")
    momentum = {float(group["momentum"]) for group in mine}
    if len(momentum) > 1:
        raise ValueError(f"the trainer's SGD has several momenta ({sorted(momentum)}): give all parameters the same")
    sgd = SGD(_one_or_all([g["lr"] for g in mine]), momentum.pop(), _one_or_all([g["weight_decay"] for g in mine]))
    if sgd.momentum and sgd.decay is not None:
        raise ValueError("the trainer's SGD has momentum and weight decay, which then goes through the momentum: set one to 0")
    return sgd


def _one_or_all(values: Sequence[Any]) -> Scalar:
    numbers = [float(v) for v in values]
    return numbers[0] if len(set(numbers)) == 1 else torch.tensor(numbers, dtype=torch.float64, device="cpu")
