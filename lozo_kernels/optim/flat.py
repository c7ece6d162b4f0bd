"""What is said when a run learns nothing, because F(+) and F(-) are equal in every bit."""

from __future__ import annotations

import torch

from ..model.handle import Handle
from .steps import StepInfo

FLAT_STEPS = 10
"""By how many the steps with c = 0 have to outnumber the others before a user is warned."""


def why_flat(info: StepInfo, handle: Handle, eps: float) -> str:
    """Returns the warning, which names the likely cause and the way out. It reads the losses of the last step."""
    said = f"F(+) and F(-) were equal in every bit in {FLAT_STEPS} steps, in which nothing was learned: "
    losses = info.loss_plus.detach().cpu()
    coarse = next((d for d in (torch.bfloat16, torch.float16) if torch.equal(losses.to(d).to(losses.dtype), losses)), None)
    if coarse is not None and bool(losses.any()):
        return said + (
            f"the loss has no more bits than {_name(coarse)} holds, too few to show what eps={eps:g} changes: compute it in fp32 "
            "(logits.float()); an accuracy needs larger batches, and a loss that is constant has to depend on the trained weights"
        )
    halves = sorted({_name(p.dtype) for p in handle.parameters if p.dtype in (torch.bfloat16, torch.float16)})
    return said + (
        "the loss does not depend on the trained weights (does the closure run the model that the optimiser was given, and not a "
        "copy of it or a result that was kept?), or "
        + (f"eps={eps:g} is lost in the rounding of {halves[0]}: raise eps" if halves else f"eps={eps:g} is too small")
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
