"""patch(): the handle that a model's placement asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from .backward import DRIVES, Backward
from .config import OPTIONS, PatchConfig, PatchOptions, check_names
from .handle import Handle, register_handle
from .probe import ProbeHandle

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DriveOptions(PatchOptions, total=False):
    """What :func:`patch` takes as keywords."""

    drive: str


def patch(model: nn.Module, *, drive: str = "closure", **options: Unpack[PatchOptions]) -> Handle:
    """Prepares a model for forward-only training. Nothing of the model changes until the handle is used.

    Args:
        model: any module; parameters that require a gradient are trained, tied ones once.
        estimator, rank, interval, seed, scaling, include, exclude, rounding, backend, placement, side, keep_factors,
            allow_drift, square: see :class:`PatchConfig`.
        drive: "closure": an optimiser's ``step(closure)`` evaluates. "backward": a call of the model in train mode makes all
            evaluations of a step, its loss can be backpropagated, and ``step()`` follows (:mod:`lozo_kernels.model.backward`).
            The model's parameters then require no gradient until the handle is restored. Build the optimiser before wrapping the
            model for several processes. "loss": the same for a loss that is computed outside of the model, by way of
            :meth:`lozo_kernels.model.backward.Backward.project`.

    Returns:
        The handle, a :class:`~lozo_kernels.ProbeHandle` unless the placement is "inplace"; ``handle.restore()`` gives the
        model back.

    Raises:
        TypeError, ValueError: a setting or a parameter does not fit; the model is untouched.
        RuntimeError: the model is patched already, or the named backend cannot serve one of its devices.
    """
    check_names("patch()", options, (*OPTIONS, "drive"))
    config = PatchConfig(**options)  # type: ignore[arg-type]
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch() takes a torch.nn.Module, not {type(model).__name__}")
    if drive not in DRIVES:
        raise ValueError(f"drive is one of {', '.join(map(repr, DRIVES))}, not {drive!r}")
    kind = Handle if config.placement == "inplace" else ProbeHandle
    handle = register_handle(model, lambda: kind(model, config))
    if drive != "closure":
        try:
            if handle.sharded:
                raise ValueError("drive='backward' is not for sharded models (fully_shard): use step(closure)")
            handle.backward = Backward(model, intercept=drive == "backward")
        except BaseException:
            handle.restore()
            raise
    return handle
