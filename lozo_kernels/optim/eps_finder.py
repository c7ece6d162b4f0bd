"""An eps that is measured: the one at which rounding and curvature together make the smallest error of c.

c(eps) = (F(+) - F(-)) / (2 eps) has an error of rounding in the order of 1 / eps, and one of the third derivative in the order of
eps^2. Neither is known, but c(eps) and c(2 eps) differ by both: along the same directions their difference is smallest at about
0.72 times the eps whose error is smallest, whatever the two constants are. The eps taken is 1.41 times that, between the two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.config import OPTIONS, check_names
from ..model.losses import bind_inputs, pair_closures
from ..model.patching import patch
from ..model.weighed import StepClosure
from .stepper import Stepper
from .steps import StepSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..model.config import PatchOptions

SCALES = tuple(2.0**-k for k in range(16, 4, -1))
"""1.5e-5 to 0.03."""
DIRECTIONS = 8
"""With four of them, what is found for a model in bf16 may be an octave and a half from the best."""
_TIE = 1.25
"""Scales whose neighbour differs by so many times the least count as equal, and the smallest of them is taken."""
_MOST = 0.7
"""The largest difference of two neighbours, in parts of the slope, that a scale is taken from. Rounding alone makes about 2."""


@torch.no_grad()
def find_eps(model: nn.Module, closure: Any, inputs: Any = None, **patch_options: Unpack[PatchOptions]) -> float:
    """Measures a good perturbation scale for a model and a batch, which a run then has as ``eps``: 192 forward passes, once.

    Weights are only read. Those that the run will move are evaluated as they would be, rounded to their dtype.

    Args:
        model: not patched.
        closure, inputs: as for :meth:`ZerothOrderOptimizer.step`.
        patch_options: those of the run (:func:`lozo_kernels.patch`).

    Returns:
        A power of two times sqrt(2), from 2.2e-5 to 0.022.

    Raises:
        ValueError: c is nowhere above its error, or a weight has to be moved.
        RuntimeError: the model is patched already.
    """
    options: dict[str, Any] = dict(patch_options)
    check_names("find_eps()", options, OPTIONS)
    if options.get("placement", "inplace") == "inplace":
        options |= {"placement": "probe", "side": "scratch"}
    closures, batches = pair_closures(closure, inputs)
    evaluated = [StepClosure(one) for one in closures]
    bound = evaluated if batches is None else bind_inputs(evaluated, batches)
    handle = patch(model, **options)
    try:
        stepper = Stepper(handle, StepSettings(directions=DIRECTIONS))
        stepper.prepare(bound)
        if handle.moves_weights:
            raise ValueError("a weight of this model can only be moved in place, which would round it: give eps as a number")
        seen = []
        for eps in SCALES:
            stepper.settings.eps = eps
            seen.append(stepper.estimate(bound)[0][0].cpu())
    finally:
        handle.restore()
    return best_scale(torch.stack(seen))


def best_scale(c: Tensor) -> float:
    """The eps that follows from c at :data:`SCALES`, (scales, directions). Raises ValueError if no two neighbours agree."""
    differences, sizes = (c[:-1] - c[1:]).square().mean(1).sqrt(), c[1:].square().mean(1).sqrt()
    shares = torch.where(sizes > 0, differences / sizes, math.inf).nan_to_num(nan=math.inf)
    least = int((shares <= _TIE * shares.min()).nonzero()[0])
    if not float(shares[least]) < _MOST:
        raise ValueError(
            f"no eps from {SCALES[0]:.1g} to {SCALES[-1]:.1g} gives a slope: F(+) - F(-) is rounding or curvature in all of them. "
            "Does the closure evaluate the model that is trained, at finite losses?"
        )
    return SCALES[least] * math.sqrt(2.0)
