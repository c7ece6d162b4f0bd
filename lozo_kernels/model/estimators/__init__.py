"""Gradient estimators by name. :func:`lozo_kernels.register_estimator` adds one from outside of the package."""

from __future__ import annotations

from .directions import Dense, Estimator, FactorSpec, LowRank
from .factored import FactoredEstimator
from .guided import Guided
from .muon import Muon
from .perexample import PerExample
from .subspace import Subspace

ESTIMATORS: dict[str, type[Estimator]] = {e.name: e for e in (LowRank, Dense, Subspace, Muon, Guided, PerExample)}

__all__ = [
    "ESTIMATORS",
    "Dense",
    "Estimator",
    "FactorSpec",
    "FactoredEstimator",
    "Guided",
    "LowRank",
    "Muon",
    "PerExample",
    "Subspace",
]
