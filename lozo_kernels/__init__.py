"""Fine-tune large language models with forward passes only: LOZO, LOZO-M, MeZO, SubZero, ZO-Muon and GRZO on fused kernels."""

import sys as _sys

from .errors import NonFiniteLossError
from .kernels import backends as _backends  # noqa: F401  (registers the backends)
from .kernels import noise, ops, reference, skinny
from .kernels import torch_ops as _library  # noqa: F401  (registers the ops with torch)
from .kernels.calls import Draw, Rounding
from .kernels.registry import choose_backend
from .kernels.table import TensorTable
from .kernels.version import __version__ as __version__
from .model.config import PatchConfig
from .model.estimators import FactoredEstimator, FactorSpec
from .model.handle import Handle
from .model.patching import handle_of, patch
from .model.probe import BatchSplitError, LoraAdapter, ProbeHandle, export_lora
from .model.report import ParameterReport, Report
from .optim.eps_finder import find_eps
from .optim.graphs import CapturedStep, capture_step
from .optim.methods import AGZO, GRZO, LOZO, MeZO, SubZero, ZOMuon
from .optim.parallel import DivergenceError, Parallel, PeerLostError
from .optim.registering import register_estimator
from .optim.steps import StepInfo

for _module in (noise, ops, reference, skinny):  # so that ``from lozo_kernels.noise import factor`` works too
    _sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module

__all__ = [
    "AGZO",
    "GRZO",
    "LOZO",
    "BatchSplitError",
    "CapturedStep",
    "DivergenceError",
    "Draw",
    "FactorSpec",
    "FactoredEstimator",
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
    "ZOMuon",
    "capture_step",
    "choose_backend",
    "export_lora",
    "find_eps",
    "handle_of",
    "noise",
    "ops",
    "patch",
    "reference",
    "register_estimator",
    "skinny",
]
