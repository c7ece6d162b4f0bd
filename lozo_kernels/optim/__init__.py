"""LOZO, LOZO-M, MeZO, MeZO-M, SubZero and ZO-Muon as optimisers of torch."""

from ..errors import NonFiniteLossError
from .optimizer import LOZO, MeZO, SubZero, ZerothOrderOptimizer, ZOMuon

__all__ = ["LOZO", "MeZO", "NonFiniteLossError", "SubZero", "ZOMuon", "ZerothOrderOptimizer"]
