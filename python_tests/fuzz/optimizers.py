"""Optimisers with any settings and closures, and states that are damaged on their way from one optimiser to another."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from lozo_kernels import LOZO, MeZO, SubZero, handle_of
from python_tests.fuzz.choices import (
    ANSWER,
    ODD_NUMBERS,
    ODD_THINGS,
    Choices,
    Finding,
    Memory,
    PlannedError,
    attempt,
    expect,
    reference_answer,
)
from python_tests.fuzz.models import UNIT, contents, loss_of, make_model, make_options, memory_of

KINDS = (LOZO, MeZO, SubZero)


class Nearly(Memory):
    """Weights that were moved and moved back may have rounded; nothing else may differ."""

    def __init__(self, model: nn.Module, moved: float) -> None:
        super().__init__()
        self._model, self._moved = model, moved
        self._weights = contents(model)

    def check(self, what: str) -> None:
        for name, p in contents(self._model).items():
            wide = torch.complex128 if p.is_complex() else torch.float64
            x = self._weights[name].to(wide)
            bound = (x.abs() + self._moved) * UNIT.get(p.dtype, 0.0) * 16 + 1e-7
            if not bool(((p.to(wide) - x).abs() <= bound).all()):
                raise Finding(f"{what}, and {name} was changed")


def make_settings(case: Choices, probing: bool) -> dict[str, Any]:
    """Keywords of an optimiser, without those of :func:`patch`."""
    settings: dict[str, Any] = {
        "lr": case.of(1e-2, 0.0, 1e-6, torch.tensor(1e-3)),
        "eps": case.of(1e-3, 1e-2, 1.0),
        "momentum": case.of(0.0, 0.0, 0.9),
        "weight_decay": case.of(0.0, 0.0, 0.1),
        "directions": case.of(1, 1, 2, 3),
        "two_sided": case.chance(75),
        "common_random_numbers": case.chance(50),
        "max_nonfinite": case.of(10, 1, 2),
        "fuse_steps": case.chance(20) and not probing,
    }
    for name in case.odd(15, *settings, "evaluation", "parallel", note="setting"):
        case.notes[-1] = f"setting: {name}"
        settings[name] = case.of(
            *ODD_NUMBERS, *ODD_THINGS, -1, 0, 2.0, torch.zeros(2), torch.tensor(math.nan), "batched", "split", "examples"
        )
    return settings


def make_closure(case: Choices, model: nn.Module) -> Any:
    """What a step is called with: a loss, now and then something else."""
    loss = loss_of(model)
    good = case.of(loss, loss, lambda: float(loss()), lambda: (loss() * 3, 3), [loss, loss])
    for odd in case.odd(15, "raises", "thing", "nan", "shape", "complex", "no closure", "sometimes", note="closure"):
        case.notes[-1] = f"closure: {odd}"
        if odd == "no closure":
            return case.of(*ODD_THINGS, [loss, 3])
        value = {
            "thing": case.of(*ODD_THINGS[:-1]),
            "nan": case.of(math.nan, math.inf, torch.tensor(math.nan), (0.0, 0.0), -math.inf),
            "shape": torch.zeros(2),
            "complex": torch.zeros((), dtype=torch.complex64),
        }.get(odd)
        calls = {"left": case.integer(0, 3) if odd == "sometimes" else 0}

        def strange(odd: str = odd, value: Any = value, calls: dict[str, int] = calls) -> Any:
            calls["left"] -= 1
            if calls["left"] >= 0:
                return loss()
            if odd in ("raises", "sometimes"):
                raise PlannedError("as planned")
            return value

        return strange
    return good


def run_optimizer(case: Choices) -> str:
    """An optimiser on a random model, and some steps against the algorithm in fp64."""
    model, kind = make_model(case, 8), case.of(*KINDS)
    memory, options = memory_of(model), make_options(case, placement=case.chance(30))
    if kind is SubZero:
        options["scaling"] = "paper"
    settings, params = make_settings(case, "placement" in options), None
    if options.get("keep_factors"):
        settings["weight_decay"] = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.chance(15) and options.keys().isdisjoint(("include", "exclude")):
        half = len(trained) // 2 or 1
        params = (
            case.of([{"params": trained[:half]}, {"params": trained[half:], "lr": 1e-3}], trained) if trained[half:] else trained
        )
    for odd in case.odd(4, *ODD_THINGS[1:], [], [{"params": []}], [{}], [torch.zeros(2)], trained[:1], trained * 2, note="params"):
        params = odd
    outcome, optimizer = attempt(case, memory, lambda: kind(model, params, **settings, **options))
    if outcome != ANSWER:
        expect(handle_of(model) is None, "the optimiser failed, and the model is patched", case)
        return outcome
    memory.check("an optimiser was made")
    for _ in range(case.of(1, 2, 3)):
        outcome = _step(case, model, optimizer)
        if outcome != ANSWER:
            break
    return outcome


def _step(case: Choices, model: nn.Module, optimizer: Any) -> str:
    closure = make_closure(case, model)
    handle, done = optimizer.handle, optimizer.steps_done
    optimizer.flush()
    before = contents(model)
    scale = float(optimizer.eps) * 30 * (handle.config.rank + 1) * (1 + optimizer.directions)
    memory = Nearly(model, scale if handle.config.placement == "inplace" or handle.groups else 0.0)
    lost = not all(bool(x.isfinite().all()) for x in before.values() if x.is_floating_point())
    if lost or handle.config.placement != "inplace":  # a probe may find that a model cannot be probed, an overflow that it is late
        case.notes.append("on its way")
    outcome, loss = attempt(case, memory, lambda: optimizer.step(closure))
    if outcome != ANSWER:
        if outcome != "NonFiniteLossError":
            expect(optimizer.steps_done == done, "a step that failed was counted", case)
        return outcome
    with reference_answer(case):
        info = optimizer.info
        expect(optimizer.steps_done == done + 1 and loss.dtype == torch.float64 and loss.dim() == 0, "not one step", case)
        distance = 2 * float(optimizer.eps) if optimizer.two_sided else float(optimizer.eps)
        c = (info.loss_plus - info.loss_minus) / distance
        wanted = c if bool(c.isfinite().all()) else torch.zeros_like(c)
        expect(torch.equal(info.c, wanted) and bool(info.skipped) != bool(c.isfinite().all()), "c is not the difference", case)
        optimizer.flush()
        handle.merge()
        if not optimizer.momentum and not lost:
            _check_update(case, optimizer, before, info, done)
    return outcome


def _check_update(case: Choices, optimizer: Any, before: dict[str, Tensor], info: Any, step: int) -> None:
    handle = optimizer.handle
    settings = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    kinds = {slot.name: slot.kind for slot in handle.trained}
    count, inplace = optimizer.directions, handle.config.placement == "inplace"
    for name, p in contents(handle.model).items():
        if name not in handle.names:  # one that is odd may be a part of one that is trained
            expect(name == "extra.odd" or torch.equal(p, before[name]), f"{name} is not trained and moved", case)
            continue
        x, now = before[name].double(), p.double()
        lr = 0.0 if bool(info.skipped) else float(settings[name]["lr"])
        factor = handle.config.update_factor / handle.config.perturb_factor if kinds[name] == "lowrank" else 1.0
        wanted, size = x * (1 - lr * float(settings[name]["weight_decay"])), x.abs()
        for d in range(count):
            direction = handle.materialize(name, step, direction=d).double()
            move = lr * factor * float(info.c[d]) / count * direction
            wanted = wanted - move
            size = size + move.abs() + (2 * float(optimizer.eps) * direction.abs() if inplace else 0)
        bound = ((2 + 4 * count) * 1.5 * UNIT[p.dtype] + 64 * 2.0**-24) * size + 2.0**-20
        good = ((now - wanted).abs() <= bound) | ~(size + wanted.abs() <= 3e4)
        expect(bool(good.all()), f"{name} of {tuple(p.shape)} {p.dtype} was updated wrongly", case)


def run_state(case: Choices) -> str:
    """A state, damaged or not, into another optimiser: refused with nothing changed, or taken as it is."""
    model, kind = make_model(case, 0), case.of(*KINDS)
    options = make_options(case)
    options = {k: v for k, v in options.items() if k in ("rank", "interval", "rounding", "placement", "side", "keep_factors")}
    other = copy.deepcopy(model)
    settings = {"lr": 1e-3, "momentum": case.of(0.0, 0.9), "directions": case.of(1, 2), "fuse_steps": False}
    if case.notes:
        case.notes.append("option")
    loss, theirs = loss_of(model), None
    outcome, optimizer = attempt(case, memory_of(model), lambda: kind(model, **settings, **options))
    if outcome != ANSWER:
        return outcome
    with reference_answer(case):
        theirs = kind(other, **settings, **options)
        for _ in range(case.of(1, 2)):
            optimizer.step(loss)
        state = copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(model.state_dict())
        clean = copy.deepcopy(theirs.state_dict())
    if case.chance(80):
        case.notes.append("state")
        state = _damage(case, state)
    outcome, _ = attempt(case, memory_of(other), lambda: theirs.load_state_dict(state))
    now = theirs.state_dict()
    without = () if settings["momentum"] else ("window",)  # V is drawn when it is needed
    without += () if theirs.handle.config.placement == "probe" else ("past", "history")
    for key in without:
        now.pop(key), clean.pop(key)
    if outcome == ANSWER:
        expect(_same(now, state), "a state was taken as another", case)
    else:
        expect(_same(now, clean), "a state was refused and taken in part", case)
    return outcome


def _damage(case: Choices, state: Any) -> Any:
    """Something in it is gone, or something else."""
    here, path = state, []
    for _ in range(case.of(1, 1, 2, 3, 4)):
        keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, (list, tuple)) else []
        if not keys:
            break
        path.append(case.of(*keys))
        inner = here[path[-1]]
        if not isinstance(inner, (dict, list, tuple)) or not len(inner):
            break
        here = inner
    if not path:
        return case.of(*ODD_THINGS)
    case.notes[-1] = f"state: {path}"
    return _without(case, state, path, case.of("gone", "odd", "odd", "other"))


def _without(case: Choices, state: Any, path: list[Any], how: str) -> Any:
    key, rest = path[0], path[1:]
    is_dict = isinstance(state, dict)
    made: Any = dict(state) if is_dict else list(state)
    if rest and isinstance(made[key], (dict, list, tuple)):
        made[key] = _without(case, made[key], rest, how)
    elif how == "gone":
        del made[key]
    elif how == "other" and isinstance(made[key], Tensor):
        made[key] = case.of(torch.zeros(2, 2, 2), made[key].double(), made[key].to("meta"), made[key] * math.nan)
    else:
        made[key] = case.of(*ODD_THINGS, *ODD_NUMBERS, -1, 2**70)
    return made if is_dict or not isinstance(state, tuple) else tuple(made)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() <= b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)
