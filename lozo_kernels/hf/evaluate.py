"""A model as it is, on the examples of a task: zero-shot, with demonstrations in its context, or after a run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ..bench.environment import commit, versions
from ..errors import InputError
from ..model.text_table import text_table
from .data.splits import TEST_SIZE
from .loop.scoring import score
from .methods import EVALUATIONS
from .models.checkpoint import load_adapter, load_model
from .models.pretrained import computing
from .objectives import PromptedObjective
from .output import read_object
from .run import open_run, threads
from .settings import Settings


def evaluate(settings: Settings, *, checkpoint: str | None = None, command: str = "", quiet: bool = False) -> dict[str, Any]:
    """Scores a model on ``num_eval`` held-out examples (1,000, as in the papers, if that is None).

    Args:
        settings: resolved here; ``method`` is "zero-shot" or "icl" (the latter puts ``num_shots`` train examples, drawn with the
            seed, before each prompt, and drops them from the left until it fits).
        checkpoint: folder of a run of ``finetune``, of its model, or of a PEFT adapter for the settings' model: what to score
            instead of the settings' model. A run's folder also says which task it is.
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
    settings, adapter = _with_checkpoint(settings, checkpoint)
    settings = dataclasses.replace(settings, num_eval=settings.num_eval or TEST_SIZE).resolved()
    with threads(settings.threads):
        return _evaluate(settings, adapter, command, quiet)


def render_result(result: dict[str, Any]) -> str:
    """The result for a reader."""
    rows = [[name.replace("_", " "), f"{value:.1%}"] for name, value in result["metrics"].items()]
    rows.append([f"loss per {result['loss_unit']}", f"{result['loss']:.4f}"])
    if result["method"] == "icl":
        rows.append(["demonstrations", f"{result['demonstrations']:.1f}"])
    lines = [
        f"{result['task']} ({result['objective']}), {result['method']}",
        f"{result['examples']} examples from {result['data']['source']}",
        f"model {result['model']}, {result['seconds']:.0f} s",
        "",
        text_table(rows, gap=4),
    ]
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def _evaluate(settings: Settings, adapter: Path | None, command: str, quiet: bool) -> dict[str, Any]:
    start = time.perf_counter()
    run = open_run(settings, quiet=quiet)
    data, objective = run.data, run.objective
    model, notes = load_model(run.checkpoint, objective.name, data.task, settings, run.device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    run.say(f"{data.task.name}: {len(data.test)} examples from {data.source}")
    with computing(run.checkpoint.path):
        scores = score(model, objective, data.test, settings.batch_size, settings.max_new_tokens, run.device)
    counts = list(objective.shown.elements()) if isinstance(objective, PromptedObjective) else []
    if counts and min(counts) < len(objective.demonstrations):
        notes = [*notes, f"some prompts have room for {min(counts)} of the {len(objective.demonstrations)} demonstrations only"]
    return {
        "task": data.task.name,
        "method": settings.method,
        "model": str(adapter or run.checkpoint.path),
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


def _with_checkpoint(settings: Settings, checkpoint: str | None) -> tuple[Settings, Path | None]:
    """The settings for what is in the folder, and the adapter to put on their model, if it is one."""
    if checkpoint is None:
        return settings, None
    folder = Path(checkpoint)
    summary = folder / "summary.json"
    if settings.task is None and summary.is_file():
        settings = dataclasses.replace(settings, task=read_object(summary, "--checkpoint: ").get("task"))
    if settings.task is None and settings.train_file is None and folder.is_dir():
        raise InputError(f"--checkpoint {checkpoint} does not say which task it is for: give --task or --train-file")
    for place in (folder, folder / "model"):
        if (place / "adapter_config.json").is_file():
            base = read_object(place / "adapter_config.json", "--checkpoint: ").get("base_model_name_or_path")
            if settings.model is None and not base:
                raise InputError(f"--checkpoint {checkpoint}: an adapter that does not say of which model; give --model too")
            return dataclasses.replace(settings, model=settings.model or base), place
        if (place / "config.json").is_file():
            return dataclasses.replace(settings, model=str(place)), None
    raise InputError(f"--checkpoint {checkpoint}: no config.json or adapter_config.json there, nor in a folder model in it")
