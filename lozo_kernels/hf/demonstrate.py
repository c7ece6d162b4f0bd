"""The demo: a small model that learns, what a step costs on this machine, and a picture of both."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..bench.batches import CausalBatch
from ..bench.clock import Clock, clock_for
from ..bench.entrants import entrants
from ..bench.environment import cpu_name
from ..bench.models import MODELS, build_model
from ..bench.step import StepBench
from ..bench.timing import Contender, interleave
from ..errors import InputError
from .command_line import check_options
from .demo.options import Demo
from .finetune import finetune
from .loop.folder import MODEL
from .models.checkpoint import load_model, open_checkpoint
from .objectives import PromptObjective
from .reports.pictures import draw_demo
from .run import Run, open_run
from .settings import Settings
from .tables import table

RUN, PICTURE = "demo-run", "demo.png"
TOKENS = 32
_RANK, _ROUNDS = 4, 9
_SECONDS, _ROUND = 25.0, 25
"""How long the rounds take about at most, and what one costs in multiples of two forward passes."""
_NAMES = {"inplace": "this library, in place", "probe": "this library, probe", "batched": "this library, batched probe"}


def demonstrate(demo: Demo, *, show: Callable[[str], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Trains the embedded model, times steps of a larger architecture, and draws both.

    Args:
        show: is given each screen as soon as it is known, and at the end where the picture is.
        say: is given a line on what is being done.

    Returns:
        Plain values: "learning" (the summary of the run), "example", "costs" and "picture" (its path).

    Raises:
        InputError: a setting is out of range, or the folder is of something else.
    """
    check_options(demo)
    folder = Path(demo.output)
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {RUN, PICTURE}:
        raise InputError(f"--output {folder}: it holds other things than an earlier demo; give another folder")
    settings = Settings(
        steps=demo.steps,
        eval_every=max(1, demo.steps // 16),
        eval_size=200,
        compare_steps=0,
        seed=demo.seed,
        output=str(folder / RUN),
    )
    say("training the small model ...")
    learning = finetune(settings, overwrite=True, command=f"lozo-kernels demo --steps {demo.steps} --seed {demo.seed}")
    example = _example(settings, folder / RUN / MODEL)
    show(_learning_screen(learning, example))
    say(f"timing steps of {demo.architecture} ...")
    costs = measure_costs(demo.architecture)
    show(_costs_screen(costs))
    picture = draw_demo(folder / PICTURE, learning["evaluations"], costs)
    show(f"a picture of both: {picture}")
    return {"learning": learning, "example": example, "costs": costs, "picture": str(picture)}


def _example(settings: Settings, tuned: Path) -> dict[str, Any]:
    """The first of the dev examples that the model got wrong before it was tuned, with its answers before and after."""
    run = open_run(settings.resolved(), quiet=True)
    before = _answers(run, settings)
    after = _answers(run, dataclasses.replace(settings, model=str(tuned), task=run.data.task.name))
    labels = [example.label for example in run.data.dev]
    wrong = next((i for i, (given, _) in enumerate(before) if given != labels[i]), 0)
    example = run.data.dev[wrong]
    words = run.data.task.labels

    def answer(found: tuple[int, float]) -> dict[str, Any]:
        return {"answer": words[found[0]], "probability": found[1]}

    asked = f"{example.texts[0]}{run.data.task.prompt.removeprefix('{0}')}"
    return {"asked": asked, "right": words[example.label or 0], "before": answer(before[wrong]), "after": answer(after[wrong])}


@torch.no_grad()
def _answers(run: Run, settings: Settings) -> list[tuple[int, float]]:
    """The class that a model says of each dev example, with its probability."""
    objective = run.objective
    assert isinstance(objective, PromptObjective)
    model, _ = load_model(open_checkpoint(settings), objective.name, run.data.task, settings, run.device)
    encoded = objective.encode_all(run.data.dev[: settings.eval_size])
    batches = [objective.collate(rows, run.device) for rows in objective.batches(encoded, 32)]
    chances = torch.cat([objective.scores(model, batch).float().softmax(-1) for batch in batches]).cpu()
    best = chances.max(-1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def measure_costs(architecture: str) -> dict[str, Any]:
    """Times steps of an architecture with random weights, in turns with two plain forward passes and the published code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = _fast_dtype(device)
    model = build_model(architecture, dtype, device)
    parameters = sum(p.numel() for p in model.parameters())
    bench = StepBench(model, entrants(["lozo"], list(_NAMES)), _RANK)
    batch = CausalBatch(TOKENS, device, MODELS[architecture].positions, sequences=2)
    rounds = _rounds(model, batch, bench.clock)
    measured = bench.measure(batch, rounds, rounds // 3)
    bench.close()
    del bench, model
    gc.collect()
    first, detail = measured[0]
    rows = [{"name": "two forward passes", "ms": first["two_forwards_ms"], "ratio": 1.0}]
    rows += [
        {"name": _NAMES[row["placement"]], "ms": row["step_ms"], "ratio": more["times_two_forwards"]} for row, more in measured
    ]
    rows.append({"name": "published way", "ms": first["reference_step_ms"], "ratio": 1 + detail["reference_overhead"]})
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, threads: {torch.get_num_threads()}"
    about = {"architecture": architecture, "parameters": parameters, "dtype": str(dtype).removeprefix("torch."), "tokens": TOKENS}
    return about | {"rank": _RANK, "device": name, "rows": rows}


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but on a machine that multiplies faster in float32, because it has no instructions for it."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(TOKENS, 768, dtype=dtype, device=device), torch.ones(768, 3072, dtype=dtype, device=device)
        times = interleave({"": Contender(functools.partial(torch.matmul, a, b))}, 5, clock=clock_for(device))[""]
        seconds[dtype] = min(times.values())
    return min(seconds, key=seconds.__getitem__)


@torch.no_grad()
def _rounds(model: torch.nn.Module, batch: CausalBatch, clock: Clock) -> int:
    """How many rounds there is time for: three at least, one of them with the published code."""
    two = interleave({"": Contender(lambda: [batch(model) for _ in range(2)])}, 1, clock=clock)[""][0]
    return max(3, min(_ROUNDS, int(_SECONDS / (_ROUND * max(two, 1e-6)))))


def _learning_screen(learning: dict[str, Any], example: dict[str, Any]) -> str:
    before, after = (f"{example[when]['answer']} ({example[when]['probability']:.0%})" for when in ("before", "after"))
    rows = [
        ["", "before", "after"],
        ["its answer here", before, after],
        ["right answers", f"{learning['accuracy_before']:.1%}", f"{learning['accuracy_after']:.1%}"],
        ["loss", f"{learning['loss_before']:.3f}", f"{learning['loss_after']:.3f}"],
    ]
    dev, steps, seconds = learning["data"]["dev_examples"], learning["steps_done"], learning["train_seconds"]
    return "\n".join(
        [
            "1. A model learns a new question, and nothing calls backward",
            "",
            f"{learning['model']} (a Llama), which was trained on small stories",
            f'is asked:  "{example["asked"]}"  (right: {example["right"]})',
            "",
            table(rows),
            "",
            f"LOZO, {steps} steps of two forward passes, {seconds:.0f} s; scored on {dev} examples that it was not trained on",
            "",
        ]
    )


def _costs_screen(costs: dict[str, Any]) -> str:
    millions = costs["parameters"] / 1e6
    rows = [["a step", "ms", "times two forward passes"]]
    rows += [[row["name"], f"{row['ms']:.0f}", f"{row['ratio']:.2f}"] for row in costs["rows"]]
    return "\n".join(
        [
            "2. What a step costs, measured just now",
            "",
            f"{costs['architecture']} architecture, {millions:.0f}M random weights in {costs['dtype']}, {costs['tokens']} tokens",
            f"LOZO of rank {costs['rank']}, on {costs['device']}, all in turns",
            "",
            table(rows),
            "",
            "In place, weights are moved and moved back. A probe only reads them; batched, both sides are one pass.",
            "",
        ]
    )
