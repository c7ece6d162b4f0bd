"""What is left of the weights after many evaluations, and what that does to a run: as a probe, in place, and as published.

``python -m bench.probe_drift`` writes ``bench/results/probe_drift.json`` and ``.png``, about the real 260K-parameter Llama on SST-2
sentences (language modelling; the data folder is that of ``bench/real_input.py``), on one thread:

- ``drift``: how far weights are from where they were after 10,000 probes (5,000 steps with a learning rate of zero), by dtype.
- ``curves``: the dev loss of one LOZO run in several dtypes and placements, with the same noise, batches and settings. Only the
  published code draws noise of its own, and other noise in each dtype; it is held to its own fp32 run.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import plots
from bench.evidence import made_by, result_parser, write_result
from bench.sentences import LENGTH, Sentences
from lozo_kernels import LOZO
from lozo_kernels.bench.environment import OtherLoad
from lozo_kernels.bench.published import PublishedStep

Row = dict[str, Any]

SEED, RANK, INTERVAL, EPS, LR = 0, 2, 50, 1e-3, 1e-4
BATCH = 16
PROBED_BATCH = 1  # only that there is a forward pass matters where nothing is learned


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of taking steps.

    Attributes:
        placement: "in place", "in place, fused", "probe", "probe, activation", "probe, scratch" or "published".
        dtype: name of the weights' dtype.
        eps: scale of its perturbations.
    """

    placement: str
    dtype: str
    eps: float = EPS

    def __str__(self) -> str:
        return f"{self.dtype} {self.placement}"

    @property
    def truth(self) -> Way:
        """The run that this one would follow if nothing were rounded."""
        return Way("published", "float32") if self.placement == "published" else TRUTH


WAYS = tuple(
    Way(placement, dtype)
    for dtype, placements in (
        ("float32", ("in place", "published")),
        ("bfloat16", ("probe, activation", "probe, scratch", "in place", "in place, fused", "published")),
        ("float16", ("probe", "in place")),
    )
    for placement in placements
)
"""Of which there are curves."""
DRIFTING = (*(w for w in WAYS if w.dtype != "float32"), Way("published", "float16"))
"""Whose weights are compared."""
TRUTH = Way("in place", "float32")


def make_stepper(
    way: Way, model: torch.nn.Module, lr: float
) -> tuple[Callable[[Callable[[], Any]], list[float]], Callable[[], Row]]:
    """A step, which takes a closure and returns c (not the published code's), and what ends the run and says on which side each
    parameter was."""
    if way.placement == "published":
        # Its update has no 1/r, so this learning rate makes its steps those of the others.
        settings = {"rank": RANK, "interval": INTERVAL, "lr": lr / RANK, "eps": way.eps, "seed": SEED}
        published = PublishedStep(model, low_rank=True, momentum=0.0, weight_decay=0.0, **settings)
        return lambda closure: [published.step(closure)][1:], dict
    kind, _, manner = way.placement.partition(", ")
    placement = {"placement": "probe", "side": manner or "auto"} if kind == "probe" else {"fuse_steps": manner == "fused"}
    optimizer = LOZO(model, lr=lr, eps=way.eps, rank=RANK, interval=INTERVAL, seed=SEED, **placement)

    def step(closure: Callable[[], Any]) -> list[float]:
        optimizer.step(closure)
        assert optimizer.info is not None
        return optimizer.info.c.tolist()

    def end() -> Row:
        sides = collections.Counter(p.side for p in optimizer.handle.report().parameters if p.side)
        optimizer.handle.restore()
        return {"sides": dict(sides)} if sides else {}

    return step, end


def drift(way: Way, material: Sentences, probes: int) -> Row:
    """Measures how far the weights are from where they were after some numbers of probes."""
    model = material.model(way.dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = material.dev_loss(model)
    step, end = make_stepper(way, model, lr=0.0)
    batches = material.batches(PROBED_BATCH, SEED)
    points = []
    for done in range(2, probes + 1, 2):
        step(_closure(way, material, model, next(batches)))
        if done == probes or done in (2, 20, 200, 2000):
            points.append({"probes": done} | _distance(model, start))
    row = {**dataclasses.asdict(way), **end(), "points": points, "restored": _distance(model, start)}
    return row | {"dev_loss_before": before, "dev_loss_after": material.dev_loss(model)}


def _closure(way: Way, material: Sentences, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Returns a closure with a forward pass where that could touch a weight. Elsewhere only perturbing moves weights."""
    if way.placement.startswith("probe"):
        return lambda: material.objective.loss(model, batch)
    return lambda: torch.zeros(())


def _distance(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> Row:
    moved = norm = 0.0
    changed = elements = 0
    for name, p in model.named_parameters():
        moved += float((p.detach().double() - start[name].double()).square().sum())
        norm += float(start[name].double().square().sum())
        changed += int((p.detach().view(_BITS[p.element_size()]) != start[name].view(_BITS[p.element_size()])).sum())
        elements += p.numel()
    return {"relative_distance": (moved / norm) ** 0.5, "elements_changed": changed / elements, "bits_equal": changed == 0}


_BITS = {2: torch.int16, 4: torch.int32}


def curve(way: Way, material: Sentences, steps: int, eval_every: int) -> Row:
    """Measures the dev loss over a run of the model as the run sees it, with what a probe has learned and not merged yet."""
    start = time.perf_counter()
    model = material.model(way.dtype)
    evaluated, losses = [0], [material.dev_loss(model)]
    step, end = make_stepper(way, model, LR)
    batches = material.batches(BATCH, SEED)
    cs = []
    for done in range(1, steps + 1):
        batch = next(batches)
        cs += step(lambda batch=batch: material.objective.loss(model, batch))
        if done % eval_every == 0 or done == steps:
            evaluated.append(done)
            losses.append(material.dev_loss(model))
    row = {**dataclasses.asdict(way), **end(), "steps": evaluated, "dev_loss": losses, "c": cs[:INTERVAL]}
    return row | {"dev_loss_restored": material.dev_loss(model), "seconds": round(time.perf_counter() - start, 1)}


def follow(curves: list[Row]) -> None:
    """Adds to every curve how its decrease differs from that of the fp32 run, as a fraction of the latter's whole decrease.

    A shorter run is compared with as many steps of the other; both must have been evaluated after the same steps. ``c_off`` is how
    far its projected gradients are from the other's over the first steps, where the weights are nearly the same: it shows what
    rounding in the forward passes does to the difference of two losses.
    """
    by_way = {Way(c["placement"], c["dtype"]): c for c in curves}
    for c in curves:
        other = by_way.get(Way(c["placement"], c["dtype"]).truth)
        if other is None:
            continue
        mine, truth = c["dev_loss"], other["dev_loss"]
        whole = truth[0] - truth[len(mine) - 1]
        off = [((mine[0] - a) - (truth[0] - b)) / whole for a, b in zip(mine, truth, strict=False)]
        c |= {"off": off, "off_at_end": abs(off[-1]), "off_at_most": max(map(abs, off))}
        if c["placement"] != "published":
            c["c_off"] = math.dist(c["c"], other["c"][: len(c["c"])]) / math.hypot(*other["c"][: len(c["c"])])


def measure(options: argparse.Namespace, argv: Sequence[str]) -> Row:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    others = OtherLoad()
    document = made_by("bench.probe_drift", argv)
    document["settings"] = {
        name: getattr(options, name) for name in ("probes", "steps", "float16_steps", "eval_every", "eval_size")
    }
    document["settings"] |= {"seed": SEED, "rank": RANK, "interval": INTERVAL, "eps": options.eps, "lr": LR}
    document["settings"] |= {"batch_size": BATCH, "max_length": LENGTH}
    drifts, curves = [], []
    with tempfile.TemporaryDirectory() as scratch:
        material = Sentences(Path(scratch), options.eval_size)
        for way in (w for w in DRIFTING if options.only in str(w)):
            drifts.append(drift(dataclasses.replace(way, eps=options.eps), material, options.probes))
            print(_drift_line(drifts[-1]), flush=True)
        for way in (w for w in WAYS if options.only in str(w) or w == TRUTH):
            steps = min(options.steps, options.float16_steps) if way.dtype == "float16" else options.steps
            curves.append(curve(dataclasses.replace(way, eps=options.eps), material, steps, options.eval_every))
            print(f"{way}: dev loss {curves[-1]['dev_loss'][0]:.4f} -> {curves[-1]['dev_loss'][-1]:.4f}", flush=True)
    follow(curves)
    document |= {"cpus_used_by_others": others.mean(), "targets": judge(drifts, curves)}
    return document | {"drift": drifts, "curves": curves}


def judge(drifts: list[Row], curves: list[Row]) -> list[Row]:
    """Judges the project's goals for probing."""
    goals = [
        {
            "goal": f"every parameter bit-identical after the probes, {d['dtype']} {d['placement']}",
            "met": all(p["bits_equal"] for p in d["points"]),
        }
        for d in drifts
        if d["placement"].startswith("probe")
    ]
    for c in curves:
        if c["placement"].startswith("probe") and c["dtype"] == "bfloat16":
            goal = {"goal": f"a bfloat16 {c['placement']} follows float32 within 1% of the decrease", "measured": c["off_at_end"]}
            goals.append(goal | {"met": c["off_at_end"] <= 0.01})
    return goals


def _drift_line(row: Row) -> str:
    last = row["points"][-1]
    change = f"dev loss {row['dev_loss_before']:.4f} -> {row['dev_loss_after']:.4f}"
    moved = "bit-identical" if last["bits_equal"] else f"{last['relative_distance']:.1e} of the norm"
    return f"{row['dtype']} {row['placement']}: {last['probes']} probes, weights {moved}, {change}"


def render(document: Row) -> str:
    lines = [
        f"{c['dtype']:9} {c['placement']:16} decrease {c['dev_loss'][0] - c['dev_loss'][-1]:8.4f}, "
        f"off by {c['off_at_end']:.2%} of float32's at the end and {c['off_at_most']:.2%} at most"
        + (f"; c off by {c['c_off']:.1%} in the first steps" if "c_off" in c else "")
        for c in document["curves"]
        if "off" in c
    ]
    lines += [f"{'met   ' if t['met'] else 'missed'}  {t['goal']}" for t in document["targets"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "probe_drift.json")
    parser.add_argument("--probes", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--steps", type=int, default=1000, help="of the curves (default: 1000)")
    parser.add_argument("--eps", type=float, default=EPS, help=f"scale of the perturbations (default: {EPS:g})")
    parser.add_argument("--float16-steps", type=int, default=100, help="of the curves in float16, slow on a CPU (default: 100)")
    parser.add_argument("--eval-every", type=int, default=50, help="steps (default: 50)")
    parser.add_argument("--eval-size", type=int, default=872, help="dev sentences (default: 872, all)")
    parser.add_argument("--only", default="", help="what has this in its name, as in 'bfloat16 probe', and the float32 run")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    document = measure(options, argv)
    print(render(document))
    write_result(document, options.output)
    plots.save(plots.probe_drift(document), document, options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
