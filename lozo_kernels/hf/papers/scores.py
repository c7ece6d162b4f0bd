"""A table of scores: every method on every task through ``finetune``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import torch

from ...errors import InputError
from ..demo import language
from ..evaluate import evaluate
from ..finetune import finetune
from ..methods import METHODS
from ..reports.plots import compare_runs
from ..settings import Settings
from .results import TABLES, PaperTable, Recipe
from .scales import PAPER, Request, Row


def measure_scores(request: Request, device: torch.device, output: Path, command: str) -> Row:
    """Runs the methods of a table on its tasks, or on the embedded one.

    Returns:
        What the document holds of it; each run leaves a folder, and the runs together curves.png and costs.png. A cell that
        cannot be had holds its "error", and the others go on.

    Raises:
        InputError: there is no cell at all.
        KeyboardInterrupt: a run was interrupted.
    """

    def cell(method: str, task: str | None) -> Row:
        try:
            return _cell(request, method, task, device, output, command)
        except InputError as e:
            request.say(f"{method} on {task or 'the embedded task'}: {e}")
            return {"method": method, "task": task or language.TASK_NAME, "score": None, "error": str(e)}

    rows = [cell(method, task) for method in request.methods or request.paper.recipes for task in _tasks(request)]
    if all("error" in row for row in rows):
        raise InputError(rows[0]["error"])
    folders = [output / row["folder"] for row in rows if "folder" in row]
    if folders:
        compare_runs(folders, output)
    model = request.model or "the embedded model"
    sizes = {f", {row['parameters'] / 1e6:.2f}M parameters" for row in rows if "parameters" in row}
    return {"model": model, "model_label": model + "".join(sizes), "notes": _notes(request), "rows": rows}


def _cell(request: Request, method: str, task: str | None, device: torch.device, output: Path, command: str) -> Row:
    """One cell: one run, or all of a grid and the best of them."""
    recipe = find_recipe(request.paper, method)
    found: list[tuple[Row, Path]] = []
    for point in _points(recipe, request.grid):
        values = [f"{name}{value:g}" for name, value in point.items()]
        folder = output / "-".join([task or "embedded", method, *values])
        request.say(" ".join([f"{method} on {task or 'the embedded task'}", *values]))
        settings = make_settings(request, recipe, method, task, device, folder, point)
        if not METHODS[method].trains:
            result = evaluate(settings, command=command, quiet=True)
            return _row(result, result) | {"demonstrations": result["demonstrations"]}
        found.append((finetune(settings, command=command, quiet=True, overwrite=request.overwrite), folder))
        if found[-1][0]["stopped"] == "interrupted":
            raise KeyboardInterrupt
    result, folder = max(found, key=lambda pair: _dev_score(pair[0]))
    of = "test" if request.size.name == PAPER and result["test"] is not None else "dev"
    return _trained_row(result, len(found)) | {"scored": of, "folder": folder.name}


def find_recipe(table: PaperTable, method: str) -> Recipe:
    """The recipe of a method in a table; for one without a row that of the closest method that has one.

    LOZO-M takes LOZO's. SubZero takes the rank, interval and learning rates of its own paper, and the others their own learning
    rate, both with the table's examples and steps.
    """
    if method in table.recipes:
        return table.recipes[method]
    if "scaling" in METHODS[method].uses:
        return table.recipes["lozo"]
    run = {name: value for name, value in table.recipes["mezo"].settings.items() if name != "lr"}
    if METHODS[method].low_rank:
        own = TABLES["subzero"].recipes[method]
        return Recipe({**own.settings, **run}, own.grid)
    return Recipe(run)


def make_settings(
    request: Request, recipe: Recipe, method: str, task: str | None, device: torch.device, folder: Path, point: Row
) -> Settings:
    """The settings of one run: the paper's, with what the scale and the user put in their place.

    Args:
        task: None for the embedded one.
        point: the point of the grid; empty for its first one.
    """
    scale = request.size
    values = {**{name: grid[0] for name, grid in recipe.grid.items()}, **recipe.settings, **point}
    if scale.name == PAPER:
        values |= {**request.paper.data, "keep": "best"}
    if request.model is None and "lr" not in point:  # the papers' rates are for models ten thousand times larger
        values = {name: value for name, value in values.items() if name not in ("lr", "scaling")}
    if scale.name != PAPER:
        values |= {"steps": scale.steps, "batch_size": scale.batch_size, "eval_size": scale.eval_size, "eval_every": None}
        values["num_eval"] = scale.eval_size  # without num_dev: dev examples, the same ones for every method
        if "interval" in values and scale.interval is not None:
            values["interval"] = min(values["interval"], scale.interval)
    if request.steps is not None:
        values |= {"steps": request.steps, "eval_every": max(1, request.steps // 5)}
    return Settings(
        **{name: value for name, value in values.items() if name not in METHODS[method].foreign},
        method=method,
        model=request.model,
        trust_remote_code=request.trust_remote_code,
        task=task or language.TASK_NAME,
        data_dir=None if task is None else request.data_dir,
        dtype=request.chosen_dtype(method, device),
        device=str(device),
        threads=request.threads,
        seed=request.seed,
        compare_steps=0,
        output=str(folder),
    )


def _tasks(request: Request) -> list[str | None]:
    if request.tasks is not None:
        return list(request.tasks)
    return list(request.paper.columns) if request.model or request.data_dir else [None]


def _points(recipe: Recipe, grid: bool) -> Iterator[Row]:
    if not grid or not recipe.grid:
        return iter([{}])
    return (dict(zip(recipe.grid, values, strict=True)) for values in itertools.product(*recipe.grid.values()))


def _notes(request: Request) -> list[str]:
    notes = []
    if request.model is None:
        notes.append("the embedded model is four to five orders of magnitude smaller than the paper's; learning rates are its own")
    if _tasks(request) == [None]:
        notes.append("the task is the embedded one, not the paper's: --data-dir or --tasks asks for those")
    if request.size.name != PAPER or request.steps is not None:
        notes.append("runs are shorter than the paper's")
    if request.size.name != PAPER:
        notes.append("examples are the splits of the data as they are, scored on dev, not the paper's draws")
    if not request.grid:
        notes.append("one run for each cell, with the first values of the paper's grid: --grid searches it")
    elif request.size.name != PAPER:
        notes.append("the best of a grid was chosen on dev examples too, so its score is a little high")
    return notes


def _dev_score(summary: Row) -> float:
    """What a grid is searched by: dev accuracy at the end, or minus the dev loss where there is none."""
    if summary.get("accuracy_after") is not None:
        return float(summary["accuracy_after"])
    return float("-inf") if summary.get("loss_after") is None else -float(summary["loss_after"])


def _trained_row(summary: Row, runs: int) -> Row:
    """A cell of a method that trains: the task's main metric at the end, or accuracy on dev of a run that stopped early."""
    scores = summary["test"]
    if scores is None:
        accuracy = summary["accuracy_after"]
        metrics = {} if accuracy is None else {"accuracy": accuracy}
        scores = {"metrics": metrics, "loss": summary["loss_after"], "examples": summary["data"]["dev_examples"]}
    copied = ("steps_done", "step_ms", "training_peak_bytes", "training_peak_over_inference", "parameters", "stopped")
    return _row(summary, scores) | {"grid_points": runs, **{name: summary[name] for name in copied}}


def _row(result: Row, scores: Row) -> Row:
    first = next(iter(scores["metrics"].items()), (None, None))
    return {
        "method": result["method"],
        "task": result["task"],
        "metric": first[0],
        "score": None if first[1] is None else round(100 * first[1], 2),
        "loss": scores["loss"],
        "examples": scores["examples"],
        "settings": result["settings"],
    }
