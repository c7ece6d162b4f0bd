"""A whole run: data, model, evaluation, training, evaluation, reports."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, require
from ..journal import JournalError
from ..kernels.registry import choose_backend
from .data.examples import Example
from .data.load import load_data
from .loop.best import Best, Last
from .loop.building import build_driver
from .loop.journaling import NAME, new_keeper, resumed_keeper
from .loop.measure import peak_memory
from .loop.processes import counted, joined
from .loop.records import MetricsLog, to_json, unwritable, write_whole
from .loop.scoring import score
from .loop.train import BatchSampler, eval_batch_size, evaluate, train
from .models.checkpoint import pick_device
from .models.load import load_model, open_checkpoint
from .objectives import OBJECTIVES, Encoded, Objective, choose_objective
from .reports.beside_published import compare
from .reports.card import write_card
from .reports.summary import Run, plot, summarize
from .settings import Settings


def finetune(settings: Settings, *, command: str = "", quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs the settings and leaves model, metrics, plot and summary in their output folder.

    Args:
        settings: resolved here.
        command: how this run was asked for, for the summary.
        quiet: no progress on stderr.
        resume: go on with the run in the output folder, whose settings these are (:func:`~.journaling.settings_of`). Its end is
            that of a run that was never stopped, in every bit.

    Returns:
        The summary, see :func:`lozo_kernels.hf.reports.summary.summarize`. Its "stopped" is None if all steps were taken.

    Raises:
        InputError: something that the user can put right, before any training.
        KeyboardInterrupt: before the first step; later ones end the training and everything is saved.
    """
    settings = settings.resolved()
    with joined(settings, resume) as own, threads(own.threads):
        try:
            return _run(own, command, quiet or counted()[0] > 0, resume)
        except JournalError as e:
            raise InputError(f"{e}; lozo-kernels finetune --resume {settings.output} goes on from there") from None
        except Exception as e:
            why = unwritable(e)
            if why is None:
                raise
            raise InputError(
                f"--output {own.output}: {why}; make room, and lozo-kernels finetune --resume {settings.output} goes on"
            ) from e


def _run(settings: Settings, command: str, quiet: bool, resume: bool) -> dict[str, Any]:
    device = pick_device(settings.device)
    try:
        choose_backend(device, settings.backend)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--backend: {e}") from None
    data = load_data(settings)
    for package in ("tqdm", "matplotlib", "tokenizers", "transformers"):
        require(package)
    checkpoint = open_checkpoint(settings)
    name = choose_objective(settings.objective, data.task, checkpoint.causal, checkpoint.masked)
    objective = OBJECTIVES[name](checkpoint.tokenizer, data.task, checkpoint.max_length(settings.max_length))
    train_set = objective.encode_all(data.train)
    dev_set = objective.encode_all(_shuffled(data.dev)[: settings.eval_size], evaluation=True)
    output = _make_output(settings)
    keeper = new_keeper(settings, output, data, name, train_set)
    if resume:
        keeper = resumed_keeper(keeper)
    else:
        keeper.path.unlink(missing_ok=True)

    model, notes = load_model(checkpoint, name, data.task, settings, device)
    _say(quiet, f"{data.task.name}: {len(train_set)} train and {len(dev_set)} dev examples from {data.source}")
    for note in notes:
        _say(quiet, note)
    sampler = BatchSampler(train_set, settings.batch_size, settings.seed)
    first_batch = BatchSampler(train_set, settings.batch_size, settings.seed).next()
    forward_bytes = _forward_bytes(model, objective, first_batch, device)
    comparison = None
    if settings.compare_steps:
        _say(quiet, f"timing {settings.compare_steps} steps of the published way beside this library's, on copies of the model")
        comparison = compare(model, objective, first_batch, settings, device)

    test = None
    log = MetricsLog(output / "metrics.jsonl", keeper.goes_on_at or 0)
    try:
        batch_size = eval_batch_size(settings)
        best = Best(model, output, [e for e in log.evaluations if e.step]) if settings.keep == "best" else Last()
        if not log.evaluations:
            log.add_evaluation(evaluate(model, objective, dev_set, 0, batch_size, device))
        outcome = train(
            *(model, lambda: keeper.attach(build_driver(model, settings)), objective, sampler),
            *(dev_set, log, settings, device),
            quiet=quiet,
            evaluated=best.offer,
        )
        if outcome.stopped is None:
            evaluation = evaluate(model, objective, dev_set, outcome.steps_done, batch_size, device)
            log.add_evaluation(evaluation)
            best.offer(evaluation)
            best.load()
            if data.test and counted()[0] == 0:
                _say(quiet, f"scoring {len(data.test)} test examples")
                test = score(model, objective, data.test, batch_size, settings.max_new_tokens, device).to_dict()
    finally:
        log.close()

    run = Run(
        settings=settings,
        objective=name,
        loss_unit=objective.unit,
        source=data.source,
        train_examples=len(train_set),
        dev_examples=len(dev_set),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        forward_bytes=forward_bytes,
        device=device,
        notes=notes,
        command=command,
        output=output,
    )
    summary = summarize(run, outcome, log, comparison) | {"test": test, "kept_step": best.step}
    if counted()[0] > 0:  # the first process saves
        return summary
    model.save_pretrained(output / "model")
    checkpoint.tokenizer.save_pretrained(output / "model")
    write_card(output / "model", summary, data.task.metrics)
    plot(output / "loss.png", log, f"{data.task.name}, {settings.method}")
    write_whole(output / "summary.json", to_json(summary, indent=2) + "\n")  # last: where it is, all the rest is
    best.discard()
    return summary


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside the block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shuffled(examples: Sequence[Example]) -> list[Example]:
    """In an order that does not depend on the run's seed, so that every run is evaluated on the same examples."""
    examples = list(examples)
    random.Random(0).shuffle(examples)
    return examples


@torch.no_grad()
def _forward_bytes(model: torch.nn.Module, objective: Objective, examples: list[Encoded], device: torch.device) -> int | None:
    batch = objective.collate(examples, device)
    objective.loss(model, batch)
    with peak_memory(device) as memory:
        objective.loss(model, batch)
    return memory.bytes


def _make_output(settings: Settings) -> Path:
    output = Path(str(settings.output))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", NAME, "summary.json", "loss.png", "model"):
            if (output / name).exists() and (output / name).is_dir() != (name == "model"):
                kind = "a folder" if name == "model" else "a file"
                raise InputError(f"--output {output}: {name} is in the way, where {kind} of that name is to be written")
        (output / "metrics.jsonl").touch()
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    return output


def _say(quiet: bool, message: str) -> None:
    if not quiet:
        print(message, file=sys.stderr)
