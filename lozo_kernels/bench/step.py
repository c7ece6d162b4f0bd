"""``lozo-kernels bench step``: whole steps of a real architecture, beside their two forward passes and the published step."""

from __future__ import annotations

import argparse
import copy
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environment import OtherLoad
from ..optim import LOZO, MeZO, ZerothOrderOptimizer
from ..published import PublishedStep
from .arguments import DTYPE_NAMES, add_common, add_model, check_output, positive, several
from .clock import Clock, HostClock, clock_for
from .document import format_table, progress, publish, save_partial, where
from .models import MODELS, build_model
from .targets import goals, judge_step
from .timing import Contender, Seconds, interleave, median, paired_ratio, spread
from .weights import nbytes

Row = dict[str, Any]
Forward = Callable[[], Tensor]

EPS, LR, BETA, INTERVAL = 1e-3, 1e-7, 0.9, 50

METHODS = {"lozo": "lozo", "lozo-fused": "lozo", "lozo-m": "lozo-m", "mezo": "mezo"}
"""This library's methods, and the published one beside each."""

_MOMENTUM = ("lozo-m", "mezo-m")
_LENGTH = 128
_COPIES_SHARE = 0.5  # of a GPU's memory that copies of the model may fill; activations and the published code need the rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    add_model(parser, METHODS, list(METHODS))
    parser.add_argument("--tokens", type=several(positive), default=[32, 128, 512], help="tokens a batch (default: 32,128,512)")
    add_length(parser)
    parser.add_argument("--repeats", type=positive, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--peer-repeats", type=positive, default=2, help="rounds that the published step joins (default: 2)")


def add_length(parser: argparse.ArgumentParser) -> None:
    """How tokens are divided into sequences."""
    parser.add_argument(
        "--length", type=positive, default=_LENGTH, help=f"most tokens of a sequence, which divide --tokens (default: {_LENGTH})"
    )


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures and prints.

    Raises:
        InputError: transformers is missing, or the result cannot be written.
    """
    check_output(options.output)
    document = where(options.device, argv)
    others = OtherLoad()
    document["model"] = options.model
    document["parameters"] = None
    rows: list[Row] = []
    details: list[Row] = []
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        document["parameters"] = sum(p.numel() for p in model.parameters())
        for bench in benches(model, options.methods, options.rank):
            for tokens in options.tokens:
                progress(f"{options.model} {name} {tokens} tokens: {', '.join(bench.optimizers)}")
                forward = causal_forward(tokens, options.device, MODELS[options.model].positions, options.length)
                for row, detail in bench.measure(forward, options.repeats, options.peer_repeats):
                    rows.append({"method": row.pop("method"), "dtype": name, "tokens": tokens} | row)
                    details.append({"method": detail.pop("method"), "dtype": name, "tokens": tokens} | detail)
                save_partial(document, options.output, rows=rows, details=details)
            bench.close()
        del bench, model
    document["cpus_used_by_others"] = others.mean()
    document |= {"targets": judge_step(details, options.device.type, options.model), "rows": rows, "details": details}
    publish(document, render, as_json=options.json, output=options.output)
    return 0


def causal_forward(tokens: int, device: torch.device, positions: int, length: int = _LENGTH) -> Callable[[nn.Module], Tensor]:
    """The language modelling loss of a model on a fixed random batch of sequences of up to ``length`` tokens."""
    length = max(n for n in range(1, min(tokens, length, positions) + 1) if tokens % n == 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (tokens // length, length), generator=generator).to(device)
    return lambda model: model(input_ids=ids, labels=ids).loss


def benches(model: nn.Module, methods: Sequence[str], rank: int) -> Iterator[StepBench]:
    """One bench for all methods; one after the other for each where a GPU has no room for so many copies. Close each."""
    device = next(model.parameters()).device
    copies = nbytes(list(model.parameters())) * (len(methods) + 2)
    if device.type == "cuda" and copies > _COPIES_SHARE * torch.cuda.get_device_properties(device).total_memory:
        for method in methods:
            yield StepBench(model, [method], rank, published_model=model)
    else:
        yield StepBench(model, methods, rank)


class StepBench:
    """One copy of a model for each method, so that none disturbs another, one for the published code and one at rest.

    Args:
        methods: keys of :data:`METHODS`.
        published_model: what the published code moves, ``model`` itself where memory is short; default: a copy.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[str],
        rank: int,
        published_model: nn.Module | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model = model
        self.clock = clock or clock_for(next(model.parameters()).device)
        self.models = {name: copy.deepcopy(model) for name in methods}
        self.optimizers = {name: make_optimizer(name, copied, rank) for name, copied in self.models.items()}
        self.published_model = copy.deepcopy(model) if published_model is None else published_model
        self.published = {
            name: make_published(name, self.published_model, rank) for name in dict.fromkeys(METHODS[m] for m in methods)
        }

    def close(self) -> None:
        """Lets the copies go, so that the next bench finds their memory."""
        while self.optimizers:
            self.optimizers.popitem()[1].handle.restore()
        self.models.clear()
        self.published.clear()
        gc.collect()

    def measure(self, forward: Callable[[nn.Module], Tensor], repeats: int, peer_repeats: int) -> list[tuple[Row, Row]]:
        """A row for each method, with its details.

        Args:
            forward: the loss of a model on the batch.
        """
        closures = {name: TimedClosure(functools.partial(forward, copied), self.clock) for name, copied in self.models.items()}

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
        warm_up = not isinstance(self.clock, HostClock)  # the first call on a GPU loads code and grows memory
        for name, step in self.published.items():
            contenders[f"published {name}"] = Contender(functools.partial(step.step, published_forward), peer_repeats, warm_up)
        seconds = interleave(contenders, repeats, clock=self.clock)
        return [self._rows(name, seconds, closures[name].shares()[-repeats:]) for name in self.optimizers]

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
    """A closure that knows how much of a step was spent in it."""

    def __init__(self, forward: Forward, clock: Clock | None = None) -> None:
        self._forward = forward
        self._clock = clock or HostClock()
        self._inside: list[tuple[Any, Any]] = []
        self._steps: list[tuple[tuple[Any, Any], list[tuple[Any, Any]]]] = []

    def __call__(self) -> Tensor:
        """The loss."""
        start = self._clock.mark()
        loss = self._forward()
        self._inside.append((start, self._clock.mark()))
        return loss

    def step(self, optimizer: ZerothOrderOptimizer) -> None:
        """One step of an optimiser."""
        self._inside = []
        start = self._clock.mark()
        optimizer.step(self)
        self._steps.append(((start, self._clock.mark()), self._inside))

    def shares(self) -> list[float]:
        """For every step so far, what it took on top of its own forward passes, as a fraction of them. Waits for the device."""
        self._clock.wait()
        return [
            self._clock.seconds(*whole) / sum(self._clock.seconds(*span) for span in inside) - 1.0 for whole, inside in self._steps
        ]


def make_optimizer(method: str, model: nn.Module, rank: int) -> ZerothOrderOptimizer:
    """This library's optimiser of a method."""
    momentum = BETA if method in _MOMENTUM else 0.0
    if method.startswith("mezo"):
        return MeZO(model, lr=LR, eps=EPS, momentum=momentum)
    return LOZO(
        model,
        lr=LR,
        eps=EPS,
        momentum=momentum,
        fuse_steps=method == "lozo-fused",
        rank=rank,
        interval=INTERVAL,
    )


def make_published(method: str, model: nn.Module, rank: int) -> PublishedStep:
    """The published code of a method."""
    return PublishedStep(
        model,
        low_rank=not method.startswith("mezo"),
        rank=rank,
        interval=INTERVAL,
        lr=LR,
        eps=EPS,
        momentum=BETA if method in _MOMENTUM else 0.0,
        weight_decay=0.0,
        seed=0,
    )


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
    return format_table(header, lines, left=2) + goals(document)
