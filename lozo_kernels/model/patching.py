"""patch(), which makes the handle for the placement that is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .backward import DRIVES, Backward
from .config import OPTIONS, PatchConfig, PatchOptions, check_names
from .handle import Handle
from .probe import ProbeHandle
from .registered import register_handle, registered

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DriveOptions(PatchOptions, total=False):
    """The keywords of :func:`patch`."""

    drive: str


def patch(model: nn.Module, *, drive: str = "closure", **options: Unpack[PatchOptions]) -> Handle:
    """Prepares a model for forward-only training. The model does not change until the handle is used.

    Args:
        model: any module; parameters that require a gradient are trained, tied ones once.
        options: the fields of :class:`PatchConfig`: estimator, rank, interval, seed, scaling, include, exclude, rounding, backend,
            placement, side, keep_factors, allow_drift, square, directions_law.
        drive: "closure": an optimiser's ``step(closure)`` evaluates. "backward": a call of the model in train mode makes all
            evaluations of a step, its loss can be backpropagated, and ``step()`` follows (:mod:`lozo_kernels.model.backward`).
            The model's parameters then require no gradient until the handle is restored. Build the optimiser before wrapping the
            model for several processes. "loss": the same for a loss that is computed outside of the model, which then calls
            :meth:`lozo_kernels.model.backward.Backward.project`.

    Returns:
        The handle, a :class:`~lozo_kernels.ProbeHandle` unless the placement is "inplace"; ``handle.restore()`` undoes the patch.

    Raises:
        TypeError, ValueError: a setting or a parameter does not fit; the model is untouched.
        RuntimeError: the model is patched already, or the named backend cannot serve one of its devices.
    """
    check_model("patch()", model)
    check_names("patch()", options, (*OPTIONS, "drive"))
    config = PatchConfig(**options)  # type: ignore[arg-type]
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


def check_model(taker: str, model: object) -> None:
    """Raises TypeError unless it is a module, and says how parameters are given where parameters were.

    Args:
        taker: what was given the model, for the message.
    """
    if isinstance(model, nn.Module):
        return
    parameters = isinstance(model, (Tensor, Iterator, Sequence, Mapping)) and not isinstance(model, str)
    raise TypeError(
        f"{taker} takes the model, a torch.nn.Module, not {type(model).__name__}"
        + (": it finds the parameters by itself, and include= or exclude= choose among them by name" if parameters else "")
    )


def handle_of(model: nn.Module) -> Handle | None:
    """Returns the handle of a patched model, or None. A model whose handle was deleted is not patched any more."""
    return registered(model)  # type: ignore[no-any-return]
