"""LOZO, LOZO-M, MeZO, MeZO-M, SubZero, ZO-Muon and GRZO as optimisers of torch."""

from ..errors import NonFiniteLossError
from .optimizer import AGZO, GRZO, LOZO, MeZO, SubZero, ZerothOrderOptimizer, ZOMuon

__all__ = ["AGZO", "GRZO", "LOZO", "MeZO", "NonFiniteLossError", "SubZero", "ZOMuon", "ZerothOrderOptimizer"]
