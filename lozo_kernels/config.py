"""What is perturbed and how: one frozen, validated, JSON-able description."""

from __future__ import annotations

import dataclasses
import json
import operator
from typing import Any

from .noise import MAX_RANK

ESTIMATORS = ("lowrank", "dense")
SCALINGS = ("paper", "card", "published")
ROUNDINGS = ("nearest", "stochastic")


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """How a model's parameters are perturbed and updated.

    Attributes:
        estimator: "lowrank" (LOZO: U V^T for matrices, dense noise for one-dimensional tensors) or "dense" (MeZO).
        rank: r, columns of U and V, 1 to 64.
        interval: nu, steps between two draws of V (LOZO, Algorithm 1).
        seed: 64-bit seed of all noise.
        scaling: where 1/r goes. With c = (F(+) - F(-)) / (2 eps):

            ============== ===================== ===================
            scaling        perturbation          update
            ============== ===================== ===================
            "paper"        X +- eps U V^T        X -= lr c U V^T / r
            "card"         X +- eps U V^T / r    X -= lr c U V^T / r
            "published"    X +- eps U V^T        X -= lr c U V^T
            ============== ===================== ===================

            The same trajectory results from lr(published) = lr(paper) / r, and from eps(card) = r eps(paper) with
            lr(card) = r lr(paper). Dense tensors have no rank: they get eps Z and lr c Z throughout, so a conversion of lr
            changes their step relative to the matrices'.
        include: glob patterns of parameter names to train; None for all that require a gradient.
        exclude: glob patterns of parameter names to leave alone.
        rounding: of updates into bf16 and fp16: "nearest" even or "stochastic". Perturbations round to nearest.
        backend: name of a backend; None for the best of each device.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    estimator: str = "lowrank"
    rank: int = 2
    interval: int = 50
    seed: int = 0
    scaling: str = "paper"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    rounding: str = "nearest"
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("estimator", ESTIMATORS), ("scaling", SCALINGS), ("rounding", ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}")
        for name, low, high in (("rank", 1, MAX_RANK), ("interval", 1, 2**63), ("seed", 0, 2**64 - 1)):
            object.__setattr__(self, name, _integer(name, getattr(self, name), low, high))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if value is not None:
                if not all(isinstance(v, str) for v in value):
                    raise TypeError(f"{name} is a glob pattern or a sequence of them, not {value!r}")
                object.__setattr__(self, name, tuple(value))
        if self.backend is not None and not isinstance(self.backend, str):
            raise TypeError(f"backend is a name or None, not {self.backend!r}")

    @property
    def perturb_factor(self) -> float:
        """What multiplies eps for a low-rank tensor."""
        return 1.0 / self.rank if self.scaling == "card" else 1.0

    @property
    def update_factor(self) -> float:
        """What multiplies lr * c for a low-rank tensor."""
        return 1.0 if self.scaling == "published" else 1.0 / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``patch(model, **config.to_dict())`` and :meth:`from_json` take them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PatchConfig:
        """The inverse of :meth:`to_json`; an unknown field raises TypeError."""
        return cls(**json.loads(text))


def _integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is an integer, not {value!r}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} is at least {low}" + (f" and at most {high}" if high < 2**63 - 1 else "") + f", not {value}")
    return value
