"""Repeats a run's passes over the weights from its journal, without a forward pass."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import JournalError
from ..model.contract import version_of, version_problem
from ..model.handle import Handle, Perturbation
from ..optim.groups import rates_of
from ..optim.methods import OPTIMIZERS
from ..optim.optimizer import ZerothOrderOptimizer
from ..optim.rate_finder import Measured
from ..optim.stepper import Stepper
from .describe import describe_groups, describe_parameters, made_with
from .fingerprint import fingerprint
from .format import Detour, Flushed, Guides, Header, Measurement, Record, Settled, Sides, StepTaken
from .reader import RecordedRun, read_journal

Source = str | os.PathLike[str] | RecordedRun


@dataclasses.dataclass(frozen=True)
class Replayed:
    """The result of a replay.

    Attributes:
        steps: the steps that were taken; the model has the weights after these.
        skipped: how many of them made no update.
        fingerprint: of the weights now.
        agrees: whether that is the fingerprint with which the run ended; None if it was not replayed to its end, or had none.
    """

    steps: int
    skipped: int
    fingerprint: str
    agrees: bool | None


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of a verification.

    Attributes:
        replayed: the replay of the journal on a copy of the base model.
        compared: how many parameters of the tuned model were compared with the replayed ones.
        differing: names of those that are not equal in every bit.
    """

    replayed: Replayed
    compared: int
    differing: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing differs, and there was something to compare with."""
        return not self.differing and self.replayed.agrees is not False and (self.compared > 0 or self.replayed.agrees is True)


def replay(model: nn.Module, journal: Source, upto: int | None = None, backend: str | None = None) -> Replayed:
    """Gives the model on which a run started the weights that the run had, in every bit.

    The passes over the weights are those of training; no closure, no data and no forward pass is needed.

    Args:
        model: the base model, as it was when the journal was begun, and not patched.
        journal: its file, or what :func:`read_journal` returned.
        upto: steps to take; None: all.
        backend: name of a backend; None: the best of the device. Any gives the same bits, unless this raises or warns.

    Raises:
        JournalError: the journal cannot be read, is of another model, other weights or another version of the contract, or its bits
            are not promised on this backend; the weights are untouched.
        ValueError: the journal has fewer steps than ``upto``; the weights are untouched.
    """
    run = _read(journal)
    records = run.until(upto)
    if not isinstance(model, nn.Module):
        raise TypeError(f"replay() takes a torch.nn.Module, not {model!r:.200}")
    optimizer = _optimizer_of(model, run.header, backend)
    handle = optimizer.handle
    try:
        _check_mergeable(handle)
        check_fits(run, optimizer)
        retake(optimizer, records)
    finally:
        optimizer.flush()
        handle.restore()
    skipped = sum(r.skipped for r in records if isinstance(r, StepTaken))
    steps = sum(isinstance(r, StepTaken) for r in records)
    found = fingerprint(handle)
    complete = run.fingerprint is not None and steps == run.steps
    return Replayed(steps, skipped, found, found == run.fingerprint if complete else None)


def verify(
    model: nn.Module, journal: Source, tuned: nn.Module | None = None, *, upto: int | None = None, copied: bool = True
) -> Verification:
    """Checks that a run is what its journal says: replays it and compares the weights with those that the run left.

    Args:
        model: the base model.
        tuned: the model that the run left; None: only the fingerprint that the journal ends with is compared.
        upto: the tuned model is that after so many steps; None: all.
        copied: replay on a copy of the model. Otherwise the model is changed.

    Raises:
        JournalError, ValueError: as :func:`replay`.
    """
    if tuned is not None and not isinstance(tuned, nn.Module):
        raise TypeError(f"tuned is a torch.nn.Module, not {tuned!r:.200}")
    base = copy.deepcopy(model) if copied else model
    run = _read(journal)
    replayed = replay(base, run, upto)
    if tuned is None:
        return Verification(replayed, 0, ())
    mine, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    names = [p.name for p in run.header.parameters]
    differing = tuple(name for name in names if name not in theirs or not _same(mine[name], theirs[name]))
    return Verification(replayed, len(names), differing)


def revert(model: nn.Module, journal: Source, step: int, backend: str | None = None) -> Replayed:
    """Gives a model the weights that a run had after ``step`` steps.

    They are built anew from the base model, because an update that was rounded into a weight cannot be subtracted again.

    Args:
        model: the base model.

    Raises:
        JournalError: as :func:`replay`; a model that was trained already is refused.
        ValueError: the journal has fewer steps.
    """
    return replay(model, journal, upto=step, backend=backend)


@torch.no_grad()
def retake(optimizer: ZerothOrderOptimizer, records: Iterable[Record]) -> None:
    """Takes recorded steps with an optimiser, from the weights at their start. The settings of its groups stay as they are.

    Raises:
        JournalError: a record is none of this model. Steps before it were taken.
    """
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    stepper, handle = optimizer.stepper, optimizer.handle
    try:
        for record in records:
            match record:
                case StepTaken():
                    _take_step(optimizer, record)
                case Settled():
                    handle.merge()
                case Flushed():
                    stepper.flush()
                case Measurement():
                    stepper.measured = [Measured(*row) for row in record.rows]
                case Detour():
                    _make_detour(stepper, stepper.points_of(measuring=record.measuring)[: record.moves])
                case Sides() | Guides():
                    _adopt(handle, record)
                case _:
                    raise AssertionError(f"{record} is not replayed")
    except (TypeError, ValueError) as e:
        raise JournalError(f"the journal has a record that this model cannot take: {e}") from e
    finally:
        for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
            group["lr"], group["weight_decay"] = lr, decay


def check_fits(run: RecordedRun, optimizer: ZerothOrderOptimizer, *, weights: bool = True) -> None:
    """Raises JournalError unless a journal is of this optimiser's model, settings and, with ``weights``, the same weights."""
    header, handle = run.header, optimizer.handle
    needed = version_of(header.config, header.settings)
    problem = version_problem(str(run.source), header.noise_version, needed)
    if problem is not None:
        raise JournalError(problem)
    _check_settings(run, optimizer)
    mine = describe_parameters(handle, fingerprints=weights)
    theirs = header.parameters if weights else [dataclasses.replace(p, fingerprint="") for p in header.parameters]
    if len(mine) != len(theirs):
        names = {p.name for p in mine} ^ {p.name for p in theirs}
        raise JournalError(
            f"{run.source} is of another model: it trains {len(theirs)} parameters, this one {len(mine)}; e.g. {min(names)!r}"
        )
    for p, q in zip(mine, theirs, strict=True):
        for field in dataclasses.fields(p):
            x, y = getattr(p, field.name), getattr(q, field.name)
            if x != y and field.name == "fingerprint":
                raise JournalError(
                    f"{run.source} starts from other weights: {p.name!r} differs. Give the model that the run started from, "
                    "not one that was trained"
                )
            if x != y:
                raise JournalError(f"{run.source} is of another model: {field.name} of {p.name!r} is {y} there and {x} here")
    _check_promise(run, optimizer)


def _check_settings(run: RecordedRun, optimizer: ZerothOrderOptimizer) -> None:
    header, handle = run.header, optimizer.handle
    mine, theirs = handle.config.to_dict(), header.config.to_dict()
    differing = [name for name in mine if name not in ("backend", "side", "allow_drift") and mine[name] != theirs[name]]
    own = optimizer.stepper.settings.of_run
    differing += [name for name in own | header.settings if own.get(name) != header.settings.get(name)]
    if differing:
        name = differing[0]
        x, y = (mine[name], theirs[name]) if name in mine else (own.get(name), header.settings.get(name))
        raise JournalError(f"{run.source} was written with other settings: {name} is {y!r} there and {x!r} here")
    if describe_groups(optimizer) != header.groups:
        raise JournalError(f"{run.source} was written with other parameter groups")
    if optimizer.steps_done != header.first_step or optimizer.journal is not None:
        raise JournalError(
            f"{run.source} starts at step {header.first_step}, and this optimiser has taken {optimizer.steps_done} steps"
            + (" and has a journal" if optimizer.journal is not None else "")
            + ": give a new one, on the base model"
        )


def _check_promise(run: RecordedRun, optimizer: ZerothOrderOptimizer) -> None:
    """Raises or warns if equal bits are not promised here: see ``docs/journal.md``."""
    header, handle = run.header, optimizer.handle
    then, now = header.made_with, made_with(handle)
    other = sorted(set(then.get("backends", ())) ^ set(now["backends"]))
    config, low_rank = header.config, any(p.kind == "lowrank" for p in header.parameters)
    if other and header.settings["momentum"] and low_rank:
        windows = {(header.first_step + i) // config.interval for i in (0, max(0, run.steps - 1))}
        if len(windows) > 1:
            raise JournalError(
                f"{run.source} was made on {', '.join(then.get('backends', ()))}, and momentum carried from one V to the next "
                f"has the same bits on that backend only, not on {', '.join(now['backends'])}"
            )
    if config.factored and (other or then.get("torch") != now["torch"]):
        warnings.warn(
            f"{run.source} was made with torch {then.get('torch')} on {', '.join(then.get('backends', ()))}: factors of "
            f"{config.estimator!r} come from operations of torch (a QR decomposition, or eigenvalues), so that equal bits are "
            "likely here but not promised",
            stacklevel=4,
        )


def _check_mergeable(handle: Handle) -> None:
    name = next((p.name for p in handle.trained if not p.storage.mergeable), None)
    if name is not None:
        raise JournalError(
            f"{name!r} is quantised: no weight can hold what it learned. Use Journal.resume() on an optimiser of the base "
            "model, and lozo_kernels.export_lora()"
        )


def _optimizer_of(model: nn.Module, header: Header, backend: str | None) -> ZerothOrderOptimizer:
    """Makes the optimiser that a header describes, on a model that is not patched."""
    options = header.config.to_dict() | {"backend": backend}
    kind = OPTIMIZERS[options.pop("estimator")]
    names: dict[str, Any] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(name, p)
    known = [p.name for p in header.parameters]
    lost = next((name for name in known if name not in names), None)
    if lost is not None:
        raise JournalError(f"the journal is of another model: this one has no parameter {lost!r}")
    groups = [{"params": [names[known[i]] for i in group], "lr": 0.0} for group in header.groups]
    try:
        return kind(model, groups, lr=0.0, **header.settings, **options)
    except (TypeError, ValueError) as e:
        raise JournalError(f"the journal is of another model: {e}") from None


def _take_step(optimizer: ZerothOrderOptimizer, record: StepTaken) -> None:
    stepper, handle = optimizer.stepper, optimizer.handle
    for group, lr, decay in zip(optimizer.param_groups, record.lr, record.weight_decay, strict=True):
        group["lr"], group["weight_decay"] = lr, decay
    if record.returned:
        _make_detour(stepper, stepper.points)
    if record.at_rest:
        stepper.applied = (stepper.settings.directions - 1, 0.0)
    elif stepper.settings.evaluation == "sequential":
        stepper.visit(stepper.points_of(measuring=bool(stepper.measured)))
    c = torch.tensor(record.c, dtype=torch.float64, device=handle.devices[0])
    if record.skipped:
        c.fill_(float("nan"))
    unknown = torch.full_like(c, float("nan"))
    stepper.commit(*stepper.conclude(c, unknown, unknown, rates_of(optimizer.param_groups, handle, c.device)))


def _adopt(handle: Handle, record: Sides | Guides) -> None:
    if isinstance(record, Sides):
        handle.adopt_sides(record.described, install=False)
        return
    assert handle.guidance is not None
    rank, vs = handle.config.rank, {}
    for index, v in record.vs:
        vs[handle.names[index]] = torch.frombuffer(bytearray(v), dtype=torch.float16).view(rank, -1)
    handle.guidance.take(record.window, vs)


def _make_detour(stepper: Stepper, points: list[Perturbation]) -> None:
    stepper.visit(points)
    stepper.leave()


def _read(journal: Source) -> RecordedRun:
    return journal if isinstance(journal, RecordedRun) else read_journal(journal)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().reshape(-1).view(width), b.detach().to(a.device).reshape(-1).view(width))
