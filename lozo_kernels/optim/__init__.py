"""LOZO, LOZO-M, MeZO, MeZO-M, SubZero, ZO-Muon and GRZO as optimisers of torch."""

from ..errors import NonFiniteLossError
from .methods import AGZO, GRZO, LOZO, MeZO, SubZero, ZOMuon
from .optimizer import ZerothOrderOptimizer

__all__ = ["AGZO", "GRZO", "LOZO", "MeZO", "NonFiniteLossError", "SubZero", "ZOMuon", "ZerothOrderOptimizer"]
