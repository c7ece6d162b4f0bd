"""``lozo-kernels bench step``: whole steps of a real architecture, beside their two forward passes and the published step."""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import OtherLoad, environment
from ..optim import LOZO, MeZO, ZerothOrderOptimizer
from ..published import PublishedStep
from .arguments import DTYPE_NAMES, add_common, add_model, check_output, positive, several
from .document import format_table, progress, publish
from .models import MODELS, build_model
from .timing import Contender, Seconds, interleave, median, paired_ratio, spread, synchronizer

Row = dict[str, Any]
Forward = Callable[[], Tensor]

EPS, LR, BETA, INTERVAL = 1e-3, 1e-7, 0.9, 50
TARGET = {"method": "lozo", "dtype": "bfloat16", "tokens": 512, "overhead": 0.06}
"""The project's goal: a step's share on top of its two forward passes."""

METHODS = {"lozo": "lozo", "lozo-fused": "lozo", "lozo-m": "lozo-m", "mezo": "mezo"}
"""This library's methods, and the published one beside each."""

_MAX_LENGTH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    add_model(parser, METHODS)
    parser.add_argument("--tokens", type=several(positive), default=[32, 128, 512], help="tokens a batch (default: 32,128,512)")
    parser.add_argument("--repeats", type=positive, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--peer-repeats", type=positive, default=2, help="rounds that the published step joins (default: 2)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures and prints.

    Raises:
        InputError: transformers is missing, or the result cannot be written.
    """
    check_output(options.output)
    document = environment(options.device, argv)
    others = OtherLoad()
    document["model"] = options.model
    document["parameters"] = None
    rows: list[Row] = []
    details: list[Row] = []
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        document["parameters"] = sum(p.numel() for p in model.parameters())
        bench = StepBench(model, options.methods, options.rank)
        for tokens in options.tokens:
            progress(f"{options.model} {name} {tokens} tokens")
            forward = causal_forward(tokens, options.device, MODELS[options.model].positions)
            for row, detail in bench.measure(forward, options.repeats, options.peer_repeats):
                rows.append({"method": row.pop("method"), "dtype": name, "tokens": tokens} | row)
                details.append({"method": detail.pop("method"), "dtype": name, "tokens": tokens} | detail)
        del bench, model
    document["cpus_used_by_others"] = others.mean()
    document |= {"targets": judge(details), "rows": rows, "details": details}
    publish(document, render, as_json=options.json, output=options.output)
    return 0


def causal_forward(tokens: int, device: torch.device, positions: int) -> Callable[[nn.Module], Tensor]:
    """The language modelling loss of a model on a fixed random batch of sequences of up to 128 tokens."""
    length = max(n for n in range(1, min(tokens, _MAX_LENGTH, positions) + 1) if tokens % n == 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (tokens // length, length), generator=generator).to(device)
    return lambda model: model(input_ids=ids, labels=ids).loss


class StepBench:
    """One copy of a model for each method, so that none disturbs another, one for the published code and one that nothing moves.

    Args:
        methods: keys of :data:`METHODS`.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str], rank: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.models = {name: copy.deepcopy(model) for name in methods}
        self.optimizers = {name: make_optimizer(name, copied, rank) for name, copied in self.models.items()}
        published = copy.deepcopy(model)
        self.published = {name: make_published(name, published, rank) for name in dict.fromkeys(METHODS[m] for m in methods)}
        self.published_model = published

    def measure(self, forward: Callable[[nn.Module], Tensor], repeats: int, peer_repeats: int) -> list[tuple[Row, Row]]:
        """A row for each method, with its details.

        Args:
            forward: the loss of a model on the batch.
        """
        synchronize = synchronizer(self.device)
        closures = {name: TimedClosure(functools.partial(forward, copied), synchronize) for name, copied in self.models.items()}

        @torch.no_grad()
        def two_forwards() -> None:
            forward(self.model)
            forward(self.model)

        @torch.inference_mode()
        def published_forward() -> Tensor:
            return forward(self.published_model)

        contenders: dict[str, Contender] = {"two forwards": Contender(two_forwards)}
        for name, optimizer in self.optimizers.items():
            contenders[name] = Contender(functools.partial(closures[name].step, optimizer))
        for name, step in self.published.items():
            contenders[f"published {name}"] = Contender(
                functools.partial(step.step, published_forward), peer_repeats, warm_up=False
            )
        seconds = interleave(contenders, repeats, synchronize=synchronize)
        return [self._rows(name, seconds, closures[name].shares[-repeats:]) for name in self.optimizers]

    def _rows(self, name: str, seconds: Mapping[str, Seconds], shares: Sequence[float]) -> tuple[Row, Row]:
        columns = {
            "step": seconds[name],
            "two_forwards": seconds["two forwards"],
            "reference_step": seconds[f"published {METHODS[name]}"],
        }
        row = {f"{column}_ms": round(1e3 * median(s.values()), 3) for column, s in columns.items()}
        ratios = {
            "overhead": round(median(shares), 4),
            "overhead_to_pure_forwards": round(paired_ratio(columns["step"], columns["two_forwards"]) - 1, 4),
            "reference_overhead": round(paired_ratio(columns["reference_step"], columns["two_forwards"]) - 1, 4),
            "times_faster": round(paired_ratio(columns["reference_step"], columns["step"]), 3),
        }
        return {"method": name} | row, {"method": name} | ratios | {"seconds": {c: spread(s) for c, s in columns.items()}}


class TimedClosure:
    """A closure that knows how much of a step was spent in it.

    Attributes:
        shares: for every step, what it took on top of its own forward passes, as a fraction of them.
    """

    def __init__(self, forward: Forward, synchronize: Callable[[], None]) -> None:
        self.shares: list[float] = []
        self._forward = forward
        self._synchronize = synchronize
        self._inside = 0.0

    def __call__(self) -> Tensor:
        """The loss."""
        self._synchronize()
        start = time.perf_counter()
        loss = self._forward()
        self._synchronize()
        self._inside += time.perf_counter() - start
        return loss

    def step(self, optimizer: ZerothOrderOptimizer) -> None:
        """One step of an optimiser."""
        self._inside = 0.0
        start = time.perf_counter()
        optimizer.step(self)
        self._synchronize()
        self.shares.append((time.perf_counter() - start) / self._inside - 1.0)


def make_optimizer(method: str, model: nn.Module, rank: int) -> ZerothOrderOptimizer:
    """This library's optimiser of a method."""
    if method == "mezo":
        return MeZO(model, lr=LR, eps=EPS)
    return LOZO(
        model,
        lr=LR,
        eps=EPS,
        momentum=BETA if method == "lozo-m" else 0.0,
        fuse_steps=method == "lozo-fused",
        rank=rank,
        interval=INTERVAL,
    )


def make_published(method: str, model: nn.Module, rank: int) -> PublishedStep:
    """The published code of a method."""
    return PublishedStep(
        model,
        low_rank=method != "mezo",
        rank=rank,
        interval=INTERVAL,
        lr=LR,
        eps=EPS,
        momentum=BETA if method == "lozo-m" else 0.0,
        weight_decay=0.0,
        seed=0,
    )


def judge(details: Sequence[Row]) -> list[Row]:
    """The target, if its case was measured."""
    return [
        TARGET | {"measured": d["overhead"], "met": d["overhead"] <= TARGET["overhead"]}
        for d in details
        if all(d[key] == TARGET[key] for key in ("method", "dtype", "tokens"))
    ]


def render(document: Row) -> str:
    """The rows and the target as text."""
    header = (
        "method",
        "dtype",
        "tokens",
        "step ms",
        "two forwards ms",
        "overhead",
        "published ms",
        "its overhead",
        "x published",
    )
    lines = [
        (
            row["method"],
            row["dtype"],
            str(row["tokens"]),
            f"{row['step_ms']:.1f}",
            f"{row['two_forwards_ms']:.1f}",
            f"{detail['overhead']:.1%}",
            f"{row['reference_step_ms']:.0f}",
            f"{detail['reference_overhead']:.0%}",
            f"{detail['times_faster']:.2f}",
        )
        for row, detail in zip(document["rows"], document["details"], strict=True)
    ]
    goals = [
        f"{'met   ' if t['met'] else 'missed'}  {t['method']} {t['dtype']} {t['tokens']} tokens: "
        f"{t['measured']:.1%} on top of its two forward passes, target {t['overhead']:.0%}"
        for t in document["targets"]
    ]
    return "\n".join([format_table(header, lines, left=2), *([""] if goals else []), *goals])
