"""Recognises which trainer an object is by its methods, and chooses the adapter that serves it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..model.config import ROUNDINGS
from .base import COMPAT, Settings, TrainerAdapter
from .lozo import LozoAdapter, PublishedLozoAdapter
from .mezo import MediumMezoAdapter, MezoAdapter
from .subzero import DenseSubZeroAdapter, SubZeroAdapter
from .zo2 import Zo2Adapter
from .zo_llm import ZoLlmAdapter


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of trainer, recognised by its methods.

    Attributes:
        name: of its repository.
        methods: the object has all of these methods.
        adapter: serves it; ``published`` serves it with compat="published".
        switch: settings of ``trainer.args`` by which it chooses its steps, and the values with which these call the methods. The
            first setting that it has counts; a trainer that has none of them is taken to call the methods.
    """

    name: str
    methods: tuple[str, ...]
    adapter: type[TrainerAdapter]
    published: type[TrainerAdapter]
    switch: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def is_off(self, trainer: Any) -> str | None:
        """Returns why the steps of a trainer do not call the methods, or None if they do."""
        args = getattr(trainer, "args", None)
        for setting, values in self.switch:
            if hasattr(args, setting):
                found = getattr(args, setting)
                wanted = " or ".join(map(repr, values))
                return (
                    None if found in values else f"its args.{setting} is {found!r}, and {wanted} calls the methods that are served"
                )
        return None


FAMILIES = (
    Family(
        "zimingyy/SubZero",
        ("zo_subspace_perturb_parameters", "zo_subspace_update"),
        SubZeroAdapter,
        SubZeroAdapter,
        (("trainer", ("subzero_sgd",)),),
    ),
    Family(
        "zimingyy/SubZero, its MeZO",
        ("zo_subspace_perturb_parameters", "zo_perturb_parameters", "zo_step", "zo_update"),
        DenseSubZeroAdapter,
        DenseSubZeroAdapter,
        (("trainer", ("zo_sgd", "zo_adam")),),
    ),
    Family(
        "optsuite/LOZO",
        ("lowrank_zo_perturb_parameters", "lowrank_zo_step", "lowrank_zo_update"),
        LozoAdapter,
        PublishedLozoAdapter,
        (("lowrank_zo", (True,)), ("trainer", ("LOZO",))),
    ),
    Family("liangyuwang/zo2", ("zo_perturb_parameters", "zo_perturb_shifts", "zo_forward", "zo_update"), Zo2Adapter, Zo2Adapter),
    Family(
        "ZO-Bench/ZO-LLM",
        ("zo_perturb_parameters", "zo_step", "zo_step_v1", "zo_forward"),
        ZoLlmAdapter,
        ZoLlmAdapter,
        (("trainer", ("zo_sgd", "zo_sign_opt", "zo_conserv", "zo_adam")),),
    ),
    Family(
        "princeton-nlp/MeZO, large_models",
        ("zo_perturb_parameters", "zo_step", "zo_update"),
        MezoAdapter,
        MezoAdapter,
        (("trainer", ("zo",)),),
    ),
    Family(
        "princeton-nlp/MeZO, medium_models",
        ("efficient_perturb_parameters", "zo_forward"),
        MediumMezoAdapter,
        MediumMezoAdapter,
        (("zero_order_optim", (True,)),),
    ),
)
"""The first family whose methods are all there, and called, is taken: some trainers have another's methods too."""


def accelerate_trainer(
    trainer: Any,
    *,
    compat: str | None = None,
    seed: int | None = None,
    backend: str | None = None,
    rounding: str = "nearest",
) -> TrainerAdapter:
    """Serves the perturb and update methods of another project's zeroth-order trainer with the ops of this library, in place.

    The trainer keeps its loop, its losses and its schedule. Its seeds name the directions: the same seed and scalar replay. One op
    call moves all parameters of a device, and nothing as large as a weight is made.

    Args:
        trainer: an object with the methods of one of :data:`FAMILIES`.
        compat: "published" for the trainer's own stream of noise (torch's global generator, in its order) and its defects, so that
            a published run is followed to rounding. LOZO and SubZero are still applied without a temporary of the size of a
            weight; the dense noise of MeZO needs one, which is drawn for each parameter in turn.
        seed: of V (LOZO) and of U and V (SubZero), which outlive a step; default: ``trainer.args.seed``, or 0.
        backend: name of a backend; None for the best of each device.
        rounding: how updates are rounded into bf16 and fp16: "nearest" or "stochastic".

    Returns:
        The adapter. ``adapter.restore()`` gives every method back; ``with accelerate_trainer(trainer):`` does so at the end.

    Raises:
        TypeError: the object has the methods of no known trainer.
        ValueError: an argument or a setting of the trainer is not served, or its steps call none of the methods; nothing was
            changed.
        RuntimeError: the trainer is served already.
    """
    if compat not in COMPAT:
        raise ValueError(f"compat is one of {', '.join(map(repr, COMPAT))}, not {compat!r}")
    if rounding not in ROUNDINGS or (compat == "published" and rounding != "nearest"):
        raise ValueError(f"rounding is one of {', '.join(map(repr, ROUNDINGS))}, 'nearest' with compat, not {rounding!r}")
    family = recognise(trainer)
    if any(hasattr(getattr(trainer, name), "lozo_adapter") for name in family.methods):
        raise RuntimeError("this trainer is served already: call restore() on its adapter first")
    if seed is None:
        seed = getattr(getattr(trainer, "args", None), "seed", None) or 0
    kind = family.adapter if compat is None else family.published
    adapter = kind(trainer, Settings(compat, seed, backend, rounding))
    adapter.serve()
    return adapter


def recognise(trainer: Any) -> Family:
    """Returns the family of a trainer. Raises TypeError if it is none of :data:`FAMILIES`, ValueError if its settings choose steps
    that call nothing of what would be served."""
    found = [family for family in FAMILIES if all(callable(getattr(trainer, name, None)) for name in family.methods)]
    off = {family.name: family.is_off(trainer) for family in found}
    for family in found:
        if off[family.name] is None:
            return family
    if found:
        raise ValueError(
            f"{type(trainer).__name__} is that of {found[0].name}, but nothing of it would be served: "
            + "; ".join(f"{name}: {why}" if len(off) > 1 else str(why) for name, why in off.items())
        )
    looked = "; ".join(f"{family.name}: {', '.join(family.methods)}" for family in FAMILIES)
    raise TypeError(
        f"{type(trainer).__name__} has the methods of no known zeroth-order trainer ({looked}). "
        "For a trainer of your own use lozo_kernels.adapters.DirectionBackend"
    )
