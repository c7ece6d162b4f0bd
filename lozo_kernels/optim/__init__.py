"""LOZO, LOZO-M, MeZO, MeZO-M, SubZero and ZO-Muon as optimisers of torch."""

from ..errors import NonFiniteLossError
from .optimizer import AGZO, LOZO, MeZO, SubZero, ZerothOrderOptimizer, ZOMuon

__all__ = ["AGZO", "LOZO", "MeZO", "NonFiniteLossError", "SubZero", "ZOMuon", "ZerothOrderOptimizer"]
