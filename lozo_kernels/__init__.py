"""Fine-tune large language models with forward passes only: LOZO, LOZO-M, MeZO and SubZero on fused kernels."""

from . import backends as _backends  # noqa: F401  (registers the backends)
from . import library as _library  # noqa: F401  (registers the ops with torch)
from . import noise, ops, reference, skinny
from .config import PatchConfig
from .engine import Handle, handle_of
from .graphs import CapturedStep, capture_step
from .optim import LOZO, MeZO, NonFiniteLossError, SubZero
from .parallel import DivergenceError, Parallel, PeerLostError
from .patching import patch
from .probe import BatchSplitError, LoraAdapter, ProbeHandle, export_lora
from .registry import Draw, Rounding, choose_backend
from .report import ParameterReport, Report
from .steps import StepInfo
from .table import TensorTable

__version__ = "0.1.0"

__all__ = [
    "LOZO",
    "BatchSplitError",
    "CapturedStep",
    "DivergenceError",
    "Draw",
    "Handle",
    "LoraAdapter",
    "MeZO",
    "NonFiniteLossError",
    "Parallel",
    "ParameterReport",
    "PatchConfig",
    "PeerLostError",
    "ProbeHandle",
    "Report",
    "Rounding",
    "StepInfo",
    "SubZero",
    "TensorTable",
    "capture_step",
    "choose_backend",
    "export_lora",
    "handle_of",
    "noise",
    "ops",
    "patch",
    "reference",
    "skinny",
]
