"""Journals with other models and settings, adapters of what a probe learned, and the estimators of plain losses."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, export_lora, patch
from lozo_kernels.journal import Journal, diff, read_journal, replay, revert, verify
from python_tests import gradients
from python_tests.fuzz.choices import (
    ANSWER,
    ODD_NUMBERS,
    ODD_THINGS,
    Choices,
    Memory,
    PlannedError,
    attempt,
    expect,
    reference_answer,
)
from python_tests.fuzz.models import loss_of, make_model, memory_of
from python_tests.models import same, weights


@dataclasses.dataclass(frozen=True)
class Run:
    """A model before and after some steps of an optimiser, and the journal of them."""

    base: Any
    model: nn.Module
    path: Path
    steps: int
    kind: Any
    options: dict[str, Any]


def run_journal(case: Choices) -> str:
    """A short run and its journal, then something that is done with both."""
    model = make_model(case, 0)
    base, loss = copy.deepcopy(model), loss_of(model)
    options: dict[str, Any] = {
        "momentum": case.of(0.0, 0.9), "directions": case.of(1, 2), "two_sided": case.chance(75), "rank": case.of(1, 3),
        "interval": case.of(1, 2, 50), "seed": case.integer(0, 2**63),
        "placement": case.of("inplace", "inplace", "probe"), "rounding": case.of("nearest", "stochastic"),
    }  # fmt: skip
    if options["placement"] == "inplace":
        options["fuse_steps"] = case.chance(30)
    steps = case.of(1, 0, 2, 3)
    with tempfile.TemporaryDirectory() as folder, reference_answer(case):
        path = Path(folder) / "run.journal"
        kind = case.of(LOZO, LOZO, MeZO, SubZero)
        optimizer = kind(model, lr=case.of(1e-2, 0.0), weight_decay=case.of(0.0, 0.1), **options)
        if case.chance(25):
            return _create(case, optimizer, path)
        with Journal.create(path, optimizer):
            for _ in range(steps):
                optimizer.step(loss)
        run = Run(base, model, path, steps, kind, options)
        return case.of(_replay, _replay, _verify, _diff, _resume)(case, run)


def _create(case: Choices, optimizer: Any, path: Path) -> str:
    about: Any = {"by": "me"}
    fsync: Any = None
    for odd in case.odd(80, "about", "fsync", "path", "folder", "again", note="journal"):
        if odd == "about":
            about = case.of({"x": object()}, {1j: 2}, {"x": float("nan")}, *ODD_THINGS[1:])
        elif odd == "fsync":
            fsync = case.of(0, -1, *ODD_THINGS[1:])
        elif odd == "path":
            path = path.parent / "no" / "such"
        elif odd == "folder":
            path = path.parent
        else:
            Journal.create(path, optimizer)
    outcome, journal = attempt(
        case, memory_of(optimizer.handle.model), lambda: Journal.create(path, optimizer, about=about, fsync=fsync)
    )
    if outcome == ANSWER:
        expect(journal.path == path and optimizer.journal is journal, "the journal is not attached", case)
        journal.close()
    elif optimizer.journal is not None:
        optimizer.journal.close()
    return outcome


def _other(case: Choices, base: nn.Module) -> Any:
    """The base model, or one that it is not."""
    for odd in case.odd(35, "weights", "shape", "name", "dtype", "thing", "patched", "frozen", note="model"):
        if odd == "thing":
            return case.of(*ODD_THINGS)
        if odd == "weights":
            with torch.no_grad():
                base.embed.weight[0] += 1
        elif odd == "shape":
            base.head = nn.Linear(2, 2)
        elif odd == "name":
            del base.embed
        elif odd == "dtype":
            base.double()
        elif odd == "frozen":
            base.requires_grad_(False)
        else:
            base.handle = patch(base)
    return base


def _upto(case: Choices, steps: int) -> Any:
    for odd in case.odd(20, -1, steps + 1, 2**70, *ODD_THINGS[1:-1], note="upto"):
        return odd
    return case.of(None, steps)


def _memory(model: Any) -> Memory:
    return memory_of(model) if isinstance(model, nn.Module) else Memory()


def _source(case: Choices, path: Path) -> Any:
    for odd in case.odd(8, *ODD_THINGS, path / "x", path.parent, note="journal"):
        return odd
    return case.of(path, str(path), read_journal(path))


def _replay(case: Choices, run: Run) -> str:
    base, upto, source = _other(case, run.base), _upto(case, run.steps), _source(case, run.path)
    backend = case.of(None, "native", *case.odd(4, "nothing", 3, "cuda", note="backend"))
    call = case.of(replay, revert if upto is not None else replay)
    outcome, done = attempt(case, _memory(base), lambda: call(base, source, upto, backend))
    if outcome == ANSWER:
        good = done.steps == run.steps and done.agrees is not False and same(weights(base), weights(run.model))
        expect(good, "replayed to other weights", case)
    return outcome


def _verify(case: Choices, run: Run) -> str:
    base, tuned = _other(case, run.base), case.of(None, run.model)
    tame = case.tame
    for odd in case.odd(30, "moved", "thing", note="tuned"):
        if odd == "thing":
            tuned = case.of(*ODD_THINGS)
        else:
            tuned = copy.deepcopy(run.model)
            with torch.no_grad():
                tuned.embed.weight[0] += 1
    outcome, found = attempt(case, _memory(base), lambda: verify(base, _source(case, run.path), tuned))
    if outcome == ANSWER and tame:
        moved = tuned is not None and tuned is not run.model
        expect(found.good is not moved, "a verification that is wrong", case)
    return outcome


def _diff(case: Choices, run: Run) -> str:
    sources = [_source(case, run.path), _source(case, run.path)]
    outcome, found = attempt(case, Memory(), lambda: diff(*sources))
    if outcome == ANSWER:
        expect(found is None, "a journal differs from itself", case)
    return outcome


def _resume(case: Choices, run: Run) -> str:
    kind, options, base, path = run.kind, dict(run.options), run.base, run.path
    for odd in case.odd(30, "seed", "rank", "momentum", "directions", "kind", note="other settings"):
        if odd == "kind":
            kind = MeZO if kind is not MeZO else LOZO
        else:
            options[odd] = {"momentum": 0.5, "directions": 5}.get(odd, 7)
    optimizer, upto, content = kind(base, lr=1e-2, **options), _upto(case, run.steps), path.read_bytes()
    memory = memory_of(base)
    outcome, at = attempt(case, memory, lambda: Journal.resume(path, optimizer, upto=upto))
    if outcome == ANSWER:
        expect(at == run.steps, "resumed at another step", case)
        optimizer.flush()
        optimizer.handle.merge()
        expect(same(weights(base), weights(run.model)), "resumed to other weights", case)
        optimizer.journal.close()
    else:
        expect(path.read_bytes() == content and optimizer.journal is None, "a journal that was refused was changed", case)
    return outcome


def run_export(case: Choices) -> str:
    """:func:`export_lora` of what was learned: the factors give the weights."""
    torch.manual_seed(case.integer(0, 2**32))
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=case.chance(50)))
    base, x, rank = copy.deepcopy(model), torch.randn(5, 4), None
    kept, placement = True, "probe"
    for odd in case.odd(25, "not kept", "in place", "dense", "no step", note="handle"):
        kept, placement = kept and odd != "not kept", "inplace" if odd == "in place" else placement
    kind = MeZO if "dense" in case.notes else case.of(LOZO, SubZero)
    options = {"keep_factors": kept} if placement == "probe" else {}
    optimizer = kind(model, lr=1e-2, rank=case.of(1, 3), interval=case.of(1, 2, 9), placement=placement, **options)
    for _ in range(case.of(1, 2, 4) if not case.chance(8) else case.notes.append("no step") or 0):
        optimizer.step(lambda: model(x).square().mean())
    handle: Any = optimizer.handle
    for odd in case.odd(5, *ODD_THINGS, note="handle"):
        handle = odd
    for odd in case.odd(20, 0, -1, *ODD_THINGS[1:], note="rank"):
        rank = odd
    with tempfile.TemporaryDirectory() as folder:
        target = case.of(None, folder, *case.odd(5, 3, b"x", 1.5, note="folder"))
        outcome, adapter = attempt(case, memory_of(model), lambda: export_lora(handle, target, rank=rank))
    if outcome == ANSWER:
        with reference_answer(case):
            handle.merge()
            for name in ("0", "2"):
                a, b = (adapter.tensors[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
                wanted = model[int(name)].weight - base[int(name)].weight
                expect(torch.allclose(b @ a, wanted, atol=1e-5, rtol=1e-4), f"the adapter of {name} is another delta", case)
    return outcome


def run_gradients(case: Choices) -> str:
    """The estimators of :mod:`lozo_kernels.model.estimators.gradients` on a quadratic, where a central difference is exact."""
    shapes = {"w": (case.of(1, 3), case.of(2, 4)), "b": (case.of(1, 3),)}
    at: dict[str, Any] = {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}
    target, rank = {k: torch.randn_like(x) for k, x in at.items()}, case.of(1, 2)
    z: dict[str, Any] = {k: torch.randn_like(x) for k, x in at.items()}
    u: dict[str, Any] = {"w": torch.randn(shapes["w"][0], rank).double(), "b": z["b"]}
    v: dict[str, Any] = {"w": torch.randn(shapes["w"][1], rank).double()}
    s: dict[str, Any] = {"w": torch.randn(rank, rank).double()}
    eps: Any = case.of(1e-2, 0.5)

    def loss(parameters: Any) -> Any:
        try:
            return sum(((parameters[k] - target[k]) ** 2).sum() for k in at)
        except (RuntimeError, KeyError) as error:
            raise PlannedError from error

    which, function = case.of("rge", "lge", "subspace", "cge", "forward_gradient", "projected_gradient"), loss
    for odd in case.odd(30, "eps", "gone", "shape", "thing", "tensor", "loss", "all", note="argument"):
        parts = {"rge": [z, at], "projected_gradient": [z, at], "forward_gradient": [z, at], "cge": [at]}
        part = case.of(*parts.get(which, [u, v, at] if which == "lge" else [u, v, s, at]))
        key = case.of(*part)
        if odd == "eps":
            eps = case.of(0, -1.0, *ODD_NUMBERS, *ODD_THINGS[:-1])
        elif odd == "gone":
            del part[key]
        elif odd == "loss":
            value = case.of(torch.zeros(3), torch.zeros((), dtype=torch.complex64), *ODD_THINGS[:-2])
            function = lambda _, value=value: value  # noqa: E731
        elif odd == "all":
            z = u = v = case.of(*ODD_THINGS)
        else:
            part[key] = case.of(torch.randn(7, 5), torch.zeros(2, 2, 2)) if odd == "shape" else case.of(*ODD_THINGS)
    calls: dict[str, Any] = {
        "rge": lambda: gradients.rge(function, at, z, eps),
        "lge": lambda: gradients.lge(function, at, u, v, eps),
        "subspace": lambda: gradients.subspace(function, at, u, s, v, eps),
        "cge": lambda: gradients.cge(function, at, eps),
        "forward_gradient": lambda: gradients.forward_gradient(function, at, z),
        "projected_gradient": lambda: gradients.projected_gradient(function, at, z, eps),
    }
    outcome, found = attempt(case, Memory([x for x in at.values() if isinstance(x, torch.Tensor)]), calls[which])
    if outcome == ANSWER and case.tame:
        grad = {k: 2 * (x - target[k]) for k, x in at.items()}
        d = z
        if which in ("lge", "subspace"):
            middle = torch.eye(rank).double() if which == "lge" else s["w"] * (at["w"].numel() ** 0.5 / rank)
            d = {"w": u["w"] @ middle @ v["w"].T, "b": u["b"]}
        c = sum((grad[k] * d[k]).sum() for k in at)
        wanted = {k: c * d[k] / (rank if which == "lge" and k == "w" else 1) for k in at} if which != "cge" else grad
        good = abs(found - c) < 1e-6 * (1 + abs(c)) if which == "projected_gradient" else all(
            torch.allclose(found[k], wanted[k], rtol=1e-5, atol=1e-6) for k in at)  # fmt: skip
        expect(bool(good), f"{which} is another estimate", case)
    return outcome
