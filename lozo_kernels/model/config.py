"""What is perturbed and how, as one frozen, checked description that JSON can hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ..kernels.checks import as_integer, check_flag, suggestion
from ..kernels.noise import MAX_RANK, check_law

ESTIMATORS = ["lowrank", "dense", "subspace", "muon", "guided", "perexample"]
FACTORED = {"subspace", "muon"}
"""Those whose directions L V^T have factors, and a scale, of their own."""
NOISE_LEFT = ("lowrank", "muon", "guided", "perexample")
"""Those whose L is the U of the noise, which kernels make where they need it."""
SCALINGS = ("paper", "card", "published")
ROUNDINGS = ("nearest", "stochastic")
PLACEMENTS = ("inplace", "probe", "auto")
ADAPTER_PATTERNS = ("*lora_*", "*prompt_encoder*")
"""The names of what PEFT adds: LoRA factors, prompts and prefixes."""
SIDES = ("auto", "activation", "scratch", "copy")


class PatchOptions(TypedDict, total=False):
    """The keywords of :func:`~lozo_kernels.patch` and of the optimisers. :class:`PatchConfig` documents them."""

    estimator: str
    rank: int
    interval: int
    seed: int
    scaling: str
    include: Sequence[str] | str | None
    exclude: Sequence[str] | str | None
    rounding: str
    backend: str | None
    placement: str
    side: str | Mapping[str, str] | Sequence[tuple[str, str]]
    keep_factors: bool
    allow_drift: bool
    square: Sequence[str] | str | None
    directions_law: str


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """How a model's parameters are perturbed and updated.

    Attributes:
        estimator: "lowrank" (LOZO: U V^T for matrices), "guided" (AGZO: U V^T with V from the inputs of layers), "perexample"
            (GRZO: U V^T with other signs for each part of a batch), "subspace" (SubZero: U S V^T), "muon" (ZO-Muon: U V^T with an
            orthonormal V), "dense" (MeZO), or one that was registered
            (:func:`lozo_kernels.register_estimator`); one-dimensional tensors have dense noise with all.
        rank: r, columns of U and V, 1 to 64.
        interval: nu, the steps of a window, which share V (LOZO, Algorithm 1), or U and V (SubZero).
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
            changes their step relative to the matrices'. SubZero's directions have one scale, that of "paper": c D is the update.
            ZO-Muon's have elements of variance 1.
        include: glob patterns of parameter names to train; None for all that require a gradient.
        exclude: glob patterns of parameter names to leave alone.
        rounding: how updates are rounded into bf16 and fp16: "nearest" even or "stochastic". Perturbations round to nearest.
        backend: name of a backend; None for the best of each device.
        placement: "inplace" moves the weights and moves them back. "probe" only reads them: updates go into a factor B of fp32,
            which is merged into the weights once per window. "auto" is "probe", except where memory for it is missing or, with
            ``allow_drift``, moving the weights measures faster.
        side: where a probe's perturbation enters: "activation" (added to the outputs of linear and embedding layers), "scratch"
            (the perturbed weight is written to shared memory just before its module runs), "copy" (to memory of its own, once per
            evaluation), or "auto", which measures. One word for all, or (glob pattern, word) pairs or a mapping, of which the first
            that matches counts. A weight whose module does not allow what was asked for gets what it allows.
        keep_factors: keep the factors of every window, for :func:`lozo_kernels.export_lora`.
        allow_drift: let "auto" choose "inplace" for speed.
        square: glob patterns of parameters whose elements are seen as the most nearly square matrix that holds them, as SubZero
            does with the long and thin tensors of adapters. None: those of PEFT (LoRA, prompts, prefixes) with "subspace", none
            with the others.
        directions_law: that of dense directions: "normal", or "rademacher", random signs, which cost one bit of noise an element
            instead of 32 (FZOO, arXiv 2506.09034). Mean and variance are the same. U V^T stays Gaussian.

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
    placement: str = "inplace"
    side: str | Mapping[str, str] | Sequence[tuple[str, str]] = "auto"
    keep_factors: bool = False
    allow_drift: bool = False
    square: tuple[str, ...] | None = None
    directions_law: str = "normal"

    def __post_init__(self) -> None:
        words = {"estimator": ESTIMATORS, "scaling": SCALINGS, "rounding": ROUNDINGS, "placement": PLACEMENTS}
        for name, known in words.items():
            if getattr(self, name) not in known:
                hint = "; register a method of your own first (--plugin of the command)" if name == "estimator" else ""
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not {getattr(self, name)!r}{hint}")
        check_law("directions_law", self.directions_law)
        for name, low, high in (("rank", 1, MAX_RANK), ("interval", 1, 2**63), ("seed", 0, 2**64 - 1)):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), low, high))
        for name in ("square", "include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        object.__setattr__(self, "side", _sides(self.side))
        for name in ("keep_factors", "allow_drift"):
            check_flag(name, getattr(self, name))
        self._check_estimator()
        if self.backend is not None and not isinstance(self.backend, str):
            raise TypeError(f"backend is a name or None, not {self.backend!r}")
        if self.placement == "inplace" and (self.side, self.keep_factors, self.allow_drift) != ("auto", False, False):
            name = next(name for name in ("side", "keep_factors", "allow_drift") if getattr(self, name) not in ("auto", False))
            raise ValueError(f"{name} is about probing: give placement='probe' or 'auto' with it")

    def _check_estimator(self) -> None:
        if self.factored and self.scaling != "paper":
            raise ValueError(f"scaling={self.scaling!r} is about LOZO: directions of {self.estimator!r} have one scale")
        if self.keep_factors and self.estimator == "guided":
            raise ValueError("keep_factors needs the V of every window, and AGZO's is in memory for one: leave it out, or use LOZO")
        if self.per_example and (self.placement != "probe" or self.keep_factors):
            what = "keep_factors" if self.keep_factors else f"placement={self.placement!r}"
            raise ValueError(
                f"{what} is not for directions per example (GRZO): they are evaluated by placement='probe', and leave no factors"
            )

    @property
    def perturb_factor(self) -> float:
        """What multiplies eps for a low-rank tensor."""
        if self.estimator == "muon":
            return self.rank**-0.5
        return 1.0 / self.rank if self.scaling == "card" else 1.0

    @property
    def update_factor(self) -> float:
        """What multiplies lr * c for a low-rank tensor."""
        return 1.0 if self.scaling == "published" or self.factored else 1.0 / self.rank

    @property
    def per_example(self) -> bool:
        """Whether each part of a batch has a direction of its own (GRZO)."""
        return self.estimator == "perexample"

    @property
    def factored(self) -> bool:
        """Whether the directions of matrices are products L V^T with factors of the estimator's own (SubZero, ZO-Muon)."""
        return self.estimator in FACTORED

    @property
    def square_patterns(self) -> tuple[str, ...]:
        """The patterns of ``square``, or its default."""
        if self.square is None:
            return ADAPTER_PATTERNS if self.estimator == "subspace" else ()
        return self.square

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values: ``patch(model, **config.to_dict())`` takes them."""
        return {k: _plain(v) for k, v in dataclasses.asdict(self).items()}

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PatchConfig:
        """The inverse of :meth:`to_json`; raises TypeError or ValueError for anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"this is no JSON: {e}") from None
        if not isinstance(fields, dict):
            raise TypeError(f"a config is an object, not {text:.200}")
        check_names("a config", fields, OPTIONS)
        return cls(**fields)


ADDED_LATER = {"directions_law": "normal"}
"""Fields that earlier versions did not save, and what was meant without them."""

OPTIONS = tuple(field.name for field in dataclasses.fields(PatchConfig))
"""The names of a config's fields."""


_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "alpha"), "lr"),
    **dict.fromkeys(("epsilon", "zo_eps", "zero_order_eps", "mu"), "eps"),
    **dict.fromkeys(("rank_r", "gauss_rank", "r"), "rank"),
    **dict.fromkeys(("step_interval", "update_interval", "nu"), "interval"),
    **dict.fromkeys(("beta", "beta1", "betas"), "momentum"),
    **dict.fromkeys(("q", "n_directions", "num_directions"), "directions"),
}
"""What options are called in other optimisers, in papers and in published code."""


def check_names(taker: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises TypeError for a keyword that is not known, and says which may have been meant.

    Args:
        taker: what was given the keywords, for the message.
    """
    for name in given:
        if name not in known:
            meant = _ELSEWHERE.get(name)
            hint = f"; did you mean {meant}?" if meant in known else suggestion(name, known)
            raise TypeError(f"{taker} got an unexpected keyword argument {name!r}{hint}")


def _sides(value: Any) -> str | tuple[tuple[str, str], ...]:
    if isinstance(value, str):
        words: list[Any] = [value]
    else:
        pairs = list(value.items() if isinstance(value, Mapping) else value) if isinstance(value, Iterable) else [value]
        if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise TypeError(f"side is a word or pairs of a glob pattern and a word, not {value!r}")
        words = [word for _, word in pairs]
    for word in words:
        if word not in SIDES:
            raise ValueError(f"side is one of {', '.join(map(repr, SIDES))}, not {word!r}")
    return value if isinstance(value, str) else tuple((pattern, word) for pattern, word in pairs)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(pattern, str) for pattern in found):
        raise TypeError(f"{name} is a glob pattern or a sequence of them, not {value!r}")
    return found
