"""Several processes take the steps of one run together. They exchange losses and never weights."""

from ...errors import DivergenceError, PeerLostError
from .ranks import MODES, Parallel, as_parallel, shared_shards

__all__ = ["MODES", "DivergenceError", "Parallel", "PeerLostError", "as_parallel", "shared_shards"]
