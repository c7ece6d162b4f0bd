"""Checks the probe on an architecture: its loss and logits against a model whose weights really are X + B V^T + s U V^T."""

import dataclasses

import torch

from lozo_kernels import patch
from python_tests.architecture_table import ARCHITECTURES
from python_tests.architectures import build, run


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What was found.

    Attributes:
        sides: parameters on each side.
        demoted: what the check on the first evaluation moved to another side.
        logits_error, loss_error: difference from the materialised model, relative to what the perturbation changes.
        same_bits: the logits are equal bit for bit.
        untouched: no weight changed by a bit, over steps, until the merge.
    """

    name: str
    family: str
    sides: dict[str, int]
    demoted: tuple[str, ...]
    logits_error: float
    loss_error: float
    same_bits: bool
    untouched: bool


def check(name: str, side: str, *, seed: int = 0, backend: str | None = None, estimator: str = "lowrank") -> Coverage:
    """Builds an architecture, updates it twice under a probe, and compares the third step's probe with materialised weights."""
    model, inputs = build(name, seed=seed)
    run(model, inputs)  # some models change their own weights at the first call (RWKV)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    handle = patch(model, placement="probe", side=side, rank=3, seed=seed, interval=50, backend=backend, estimator=estimator)
    with torch.no_grad():
        handle.prepare(lambda: run(model, inputs)[0])
        for step in range(2):
            handle.update_(step, 1.0, 0.02, weight_decay=0.5)
        rest = [t.double() for t in run(model, inputs)]
        handle.perturb_(2, 0.02)
        probed = run(model, inputs)
    untouched = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    sides: dict[str, int] = {}
    for member in handle.members:
        sides[str(member.side)] = sides.get(str(member.side), 0) + 1

    twin, _ = build(name, seed=seed)
    run(twin, inputs)
    other = patch(twin, rank=3, seed=seed, interval=50)
    theirs = dict(zip(other.names, other.parameters, strict=True))
    with torch.no_grad():
        for member in handle.members:
            p = theirs[member.name]
            weights = torch.empty(p.shape, dtype=p.dtype)
            handle.write_perturbed(member.name, weights)
            p.copy_(weights)
        real = run(twin, inputs)
    return Coverage(
        name,
        ARCHITECTURES[name].family,
        sides,
        handle.notes,
        _relative(probed[1], real[1], rest[1]),
        _relative(probed[0], real[0], rest[0]),
        torch.equal(probed[1], real[1]) and torch.equal(probed[0], real[0]),
        untouched,
    )


def _relative(probed: torch.Tensor, real: torch.Tensor, rest: torch.Tensor) -> float:
    """Returns the norm of the difference beyond the last bits of the values, in units of the norm of the shift."""
    shift = (real.double() - rest).norm()
    last_bits = 4 * torch.finfo(real.dtype).eps * real.double().norm()
    difference = (probed.double() - real.double()).norm() - last_bits
    return float(difference.clamp(min=0.0) / shift.clamp(min=1e-30))
