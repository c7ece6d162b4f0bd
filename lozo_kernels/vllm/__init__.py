"""Trains a model where a vLLM engine serves it: LOZO on every parameter, with weights that are only read (``docs/serving.md``)."""

from .objectives import Objective, nll, rewards
from .optimizer import LOZO
from .options import engine_options

__all__ = ["LOZO", "Objective", "engine_options", "nll", "rewards"]
