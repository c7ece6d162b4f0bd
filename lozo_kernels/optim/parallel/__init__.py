"""Several processes take one run's steps: they exchange losses and never weights."""

from ...errors import DivergenceError, PeerLostError
from .ranks import MODES, Parallel, as_parallel, shared_shards

__all__ = ["MODES", "DivergenceError", "Parallel", "PeerLostError", "as_parallel", "shared_shards"]
