"""Fine-tuning Hugging Face models from the command line: tasks, data, the loop and its reports.

Only this package and the benchmarks import transformers, and only inside the functions that need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .planning.planner import plan
    from .trainer.arguments import ZOArguments
    from .trainer.attach import attach
    from .trainer.trainer import ZOTrainer

__all__ = ["ZOArguments", "ZOTrainer", "attach", "plan"]

_LAZY = {"ZOArguments": "trainer.arguments", "attach": "trainer.attach", "ZOTrainer": "trainer.trainer", "plan": "planning.planner"}


def __getattr__(name: str) -> Any:
    """What takes long to import, or needs transformers, is imported when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
