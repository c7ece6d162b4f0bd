"""LOZO, LOZO-M, MeZO, MeZO-M and SubZero as optimisers of torch."""

from ..errors import NonFiniteLossError
from .optimizer import LOZO, MeZO, SubZero, ZerothOrderOptimizer

__all__ = ["LOZO", "MeZO", "NonFiniteLossError", "SubZero", "ZerothOrderOptimizer"]
