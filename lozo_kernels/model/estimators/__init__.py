"""Gradient estimators by name. A new one is a file here, a row in this table and its name in ``config.ESTIMATORS``."""

from __future__ import annotations

from .directions import Dense, Estimator, FactorSpec, LowRank
from .subspace import Subspace

ESTIMATORS: dict[str, type[Estimator]] = {e.name: e for e in (LowRank, Dense, Subspace)}

__all__ = ["ESTIMATORS", "Dense", "Estimator", "FactorSpec", "LowRank", "Subspace"]
