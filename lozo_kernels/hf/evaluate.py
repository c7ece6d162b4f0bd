"""A model as it is, on the examples of a task: zero-shot, with demonstrations in its context, or after a run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ..bench.environment import commit, versions
from ..errors import InputError
from .data.own import task_of
from .data.splits import TEST_SIZE
from .loop.folder import METRICS, MODEL, SUMMARY
from .loop.scoring import score
from .methods import EVALUATIONS
from .models.adapters import load_adapter
from .models.checkpoint import load_model
from .models.pretrained import computing
from .objectives import OBJECTIVES, PromptedObjective
from .output import read_object
from .run import open_run, threads
from .settings import Settings
from .tables import table
from .tasks import Task


def evaluate(settings: Settings, *, checkpoint: str | None = None, command: str = "", quiet: bool = False) -> dict[str, Any]:
    """Scores a model on ``num_eval`` held-out examples (1,000, as in the papers, if that is None).

    Args:
        settings: resolved here; ``method`` is "zero-shot" or "icl" (the latter puts ``num_shots`` train examples, drawn with the
            seed, before each prompt, and drops them from the left until it fits).
        checkpoint: folder of a run of ``finetune``, of its model, or of a PEFT adapter for the settings' model: what to score
            instead of the settings' model. A run's folder also says which task it is and, without a file of examples, on which
            data; the classes of a file are those of the model.
        command: how this was asked for, for the result.
        quiet: nothing on stderr.

    Returns:
        Plain values: "metrics" by name, "loss" and "loss_unit", "examples", "demonstrations" (how many went with a prompt,
        on average), "task", "method", "objective", "data", "settings", "notes", versions and command.

    Raises:
        InputError: something that the user can put right.
    """
    if settings.method not in EVALUATIONS:
        raise InputError(f"evaluate knows the methods {' and '.join(EVALUATIONS)}, not {settings.method}")
    tuned = _open_tuned(settings, checkpoint)
    settings = dataclasses.replace(tuned.settings, num_eval=settings.num_eval or TEST_SIZE).resolved()
    with threads(settings.threads):
        return _evaluate(dataclasses.replace(tuned, settings=settings), command, quiet)


def render_result(result: dict[str, Any]) -> str:
    """The result for a reader."""
    rows = [[name.replace("_", " "), f"{value:.1%}"] for name, value in result["metrics"].items()]
    rows.append([f"loss per {result['loss_unit']}", f"{result['loss']:.4f}"])
    if result["method"] == "icl":
        rows.append(["demonstrations", f"{result['demonstrations']:.1f}"])
    lines = [
        f"model: {result['model']}",
        f"{result['task']} ({result['objective']}), {result['method']}",
        f"{result['examples']} examples from {result['data']['source']}, {result['seconds']:.0f} s",
        "",
        table(rows),
    ]
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def _evaluate(tuned: _Tuned, command: str, quiet: bool) -> dict[str, Any]:
    start, settings, adapter = time.perf_counter(), tuned.settings, tuned.adapter
    run = open_run(settings, quiet=quiet, own=tuned.own)
    data, objective = run.data, run.objective
    model, notes = load_model(run.checkpoint, objective.name, data.task, settings, run.device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    run.say(f"model: {adapter or run.model_name}")
    run.say(f"{data.task.name} ({objective.name}): {len(data.test)} examples from {data.source}")
    with computing(run.checkpoint.path):
        scores = score(model, objective, data.test, settings.batch_size, settings.max_new_tokens, run.device)
    counts = list(objective.shown.elements()) if isinstance(objective, PromptedObjective) else []
    if counts and min(counts) < len(objective.demonstrations):
        notes = [*notes, f"some prompts have room for {min(counts)} of the {len(objective.demonstrations)} demonstrations only"]
    return {
        "task": data.task.name,
        "method": settings.method,
        "model": str(adapter or run.model_name),
        "objective": objective.name,
        **scores.to_dict(),
        "loss_unit": objective.unit,
        "demonstrations": sum(counts) / len(counts) if counts else 0.0,
        "data": {"source": data.source},
        "settings": settings.to_dict(),
        "seed": settings.seed,
        "seconds": time.perf_counter() - start,
        "device": str(run.device),
        "notes": notes,
        "versions": versions(),
        "commit": commit(),
        "command": command,
    }


@dataclasses.dataclass(frozen=True)
class _Tuned:
    """What is in a folder that is to be scored.

    Attributes:
        settings: those that were given, with what the folder says.
        adapter: an adapter to put on their model, if it is one.
        own: the task of a file without one.
    """

    settings: Settings
    adapter: Path | None = None
    own: Task | None = None


def _open_tuned(settings: Settings, checkpoint: str | None) -> _Tuned:
    if checkpoint is None:
        return _Tuned(settings)
    folder = Path(checkpoint)
    summary = read_object(folder / SUMMARY, "--checkpoint: ") if (folder / SUMMARY).is_file() else {}
    if not summary and (folder / METRICS).is_file():
        raise InputError(
            f"--checkpoint {checkpoint}: its run has not ended; lozo-kernels finetune --resume {checkpoint} goes on, and "
            f"--checkpoint {folder / MODEL} scores what was last saved, if anything was"
        )
    settings = _of_run(settings, summary)
    own_file = settings.train_file or settings.dev_file
    if settings.task is None and own_file is None and folder.is_dir():
        raise InputError(f"--checkpoint {checkpoint} does not say which task it is for: give --task, --dev-file or --train-file")
    for place in (folder, folder / MODEL):
        if (place / "adapter_config.json").is_file():
            base = read_object(place / "adapter_config.json", "--checkpoint: ").get("base_model_name_or_path")
            if settings.model is None and not base:
                raise InputError(f"--checkpoint {checkpoint}: an adapter that does not say of which model; give --model too")
            settings = dataclasses.replace(settings, model=settings.model or base)
            return _Tuned(settings, place, _own_task(settings, ()))
        if (place / "config.json").is_file():
            settings = dataclasses.replace(settings, model=str(place))
            return _Tuned(settings, None, _own_task(settings, _classes(read_object(place / "config.json", "--checkpoint: "))))
    raise InputError(f"--checkpoint {checkpoint}: no config.json or adapter_config.json there, nor in a folder model in it")


def _of_run(settings: Settings, summary: dict[str, Any]) -> Settings:
    """The settings with what a run says: its task and objective, and its data where no others were given."""
    run = summary.get("settings")
    if not isinstance(run, dict):
        return dataclasses.replace(settings, task=settings.task or summary.get("task"))
    names = [name for name in ("train_file", "dev_file", "data_dir") if isinstance(run.get(name), str)]
    given = settings.task or settings.train_file or settings.dev_file or settings.data_dir
    more: dict[str, Any] = {} if given else {name: run[name] for name in names}
    if not given and run.get("dev_file") is None:  # what was held out is drawn with the seed
        more["data_seed"] = run.get("data_seed") if run.get("data_seed") is not None else run.get("seed")
    if settings.task is None:
        more["task"] = run.get("task")
        if settings.objective == "auto":
            of_file = run.get("task") is None and summary.get("objective") in OBJECTIVES
            more["objective"] = summary["objective"] if of_file else run.get("objective", "auto")
    return dataclasses.replace(settings, **more)


def _classes(config: dict[str, Any]) -> tuple[str, ...]:
    """The classes that a saved model tells apart, in the order of its scores; none for another kind of model."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return ()
    try:
        return tuple(str(names[str(i)]) for i in range(len(names)))
    except KeyError:
        return ()


def _own_task(settings: Settings, classes: tuple[str, ...]) -> Task | None:
    """The task of a file without one, for a model that knows these classes."""
    name = settings.dev_file or settings.train_file
    if settings.task is not None or name is None or not Path(name).is_file():
        return None
    task = task_of(Path(name), labelled=settings.objective != "lm", classes=classes)
    if classes and task.kind != "classification":
        raise InputError(f"{name}: the model tells {len(classes)} classes apart, and the file has no field 'label'")
    return task
