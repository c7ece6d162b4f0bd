"""Which version of the contract on bits a run follows, and what is said of a run of another version."""

from __future__ import annotations

from ..kernels.noise import CONTRACT_VERSION, NOISE_VERSION
from .config import PatchConfig


def version_of(config: PatchConfig, momentum: float) -> int:
    """Returns the version that journals and states of a run name: the latest one that changed a bit of such a run.

    Version 2 sums the products with momentum and with the factors of merges in another way. Runs without any (MeZO, and LOZO that
    moves the weights and has no momentum) have the bits of version 1.
    """
    merges = config.placement != "inplace" or config.estimator == "subspace"
    return CONTRACT_VERSION if config.estimator != "dense" and (momentum or merges) else NOISE_VERSION


def version_problem(what: str, found: object, needed: int) -> str | None:
    """Returns why a journal or a state of version ``found`` cannot go on as version ``needed``, or None if it can."""
    if found == needed:
        return None
    return (
        f"{what} was made with version {found} of the contract on bits (docs/noise.md), and this lozo_kernels makes version "
        f"{needed} of such a run: go on with the lozo_kernels that made it, or start anew"
    )
