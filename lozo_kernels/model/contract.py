"""Which version of the contract on bits a run follows, and what is said of a run of another version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..kernels.noise import CONTRACT_VERSION, NOISE_VERSION
from ..kernels.op_table import MAX_DRAWS
from .config import PatchConfig


def version_of(config: PatchConfig, settings: Mapping[str, Any]) -> int:
    """Returns the version that journals and states of a run name: the latest one that changed a bit of such a run.

    Version 2 sums the products with momentum and with the factors of merges in another way. Version 3 makes the update of many
    directions of low rank, and that of LOZO-M, a factor and a merge of it. Runs without any (MeZO, and LOZO that moves the weights,
    has no momentum, and adds at most two draws in an update) have the bits of version 1.

    Args:
        settings: of the steps; "momentum", "directions" and "fuse_steps" are read.
    """
    if config.estimator == "dense":
        return NOISE_VERSION
    if settings["directions"] + settings["fuse_steps"] > MAX_DRAWS or (settings["momentum"] and not config.factored):
        return CONTRACT_VERSION
    return _PRODUCTS if config.placement != "inplace" or config.factored else NOISE_VERSION


_PRODUCTS = 2
"""The version that changed products with the factors of merges."""


def version_problem(what: str, found: object, needed: int) -> str | None:
    """Returns why a journal or a state of version ``found`` cannot go on as version ``needed``, or None if it can."""
    if found == needed:
        return None
    return (
        f"{what} was made with version {found} of the contract on bits (docs/noise.md), and this lozo_kernels makes version "
        f"{needed} of such a run: go on with the lozo_kernels that made it, or start anew"
    )
