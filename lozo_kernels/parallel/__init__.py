"""Several processes take one run's steps: they exchange losses and never weights."""

from .channel import PeerLostError
from .ranks import MODES, DivergenceError, Parallel, as_parallel, shared_shards

__all__ = ["MODES", "DivergenceError", "Parallel", "PeerLostError", "as_parallel", "shared_shards"]
