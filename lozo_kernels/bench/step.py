"""``lozo-kernels bench step``: whole steps of a real architecture, beside two forward passes and the published step."""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model.text_table import number, text_table
from ..optim.graphs import capture_step
from ..optim.optimizer import ZerothOrderOptimizer
from .arguments import DTYPE_NAMES, add_choice, add_model, positive, several
from .batches import CausalBatch, TimedClosure
from .clock import Clock, HostClock, clock_for
from .deadline import Deadline
from .document import progress, save_partial
from .entrants import (
    CAPTURED,
    INTERVAL,
    METHODS,
    PLACEMENTS,
    Entrant,
    add_placement,
    entrants,
    make_optimizer,
    make_published,
    treatment,
)
from .models import MODELS, build_model
from .op_calls import nbytes
from .timing import Contender, Seconds, interleave, median, paired_ratio, spread

Row = dict[str, Any]

DEFAULT_PLACEMENTS = ("inplace", "probe", "batched")

_COPIES_SHARE = 0.5  # of a GPU's memory that copies of the model may fill; activations and the published code need the rest
_OWN, _EACH = "two forwards", "two forwards, a loss for each sequence"
_TOGETHER = "one forward of both"  # a plain one over the batch twice: the floor of a batched step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    add_model(parser, METHODS, list(METHODS))
    add_choice(parser, "dtype", DTYPE_NAMES, ["bfloat16", "float32"])
    add_placement(parser, DEFAULT_PLACEMENTS, (*PLACEMENTS, CAPTURED))
    parser.add_argument("--tokens", type=several(positive), default=[32, 128, 512], help="tokens a batch (default: 32,128,512)")
    parser.add_argument("--repeats", type=positive, default=7, help="interleaved rounds (default: 7)")
    parser.add_argument("--peer-repeats", type=positive, default=2, help="rounds that the published step joins (default: 2)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Measures every method in every placement.

    Raises:
        InputError: transformers is missing.
    """
    document |= {"model": options.model, "parameters": None}
    deadline = Deadline(options.seconds)
    rows: list[Row] = []
    details: list[Row] = []
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        document["parameters"] = sum(p.numel() for p in model.parameters())
        for bench in benches(model, entrants(options.methods, options.placement), options.rank):
            for tokens in options.tokens:
                if deadline.over():
                    break
                progress(f"{options.model} {name} {tokens} tokens: {', '.join(map(str, bench.models))}")
                # Evaluations that share a forward pass are of several examples, so all steps are.
                batch = CausalBatch(tokens, options.device, MODELS[options.model].positions, options.length, sequences=2)
                for row, detail in bench.measure(batch, options.repeats, options.peer_repeats):
                    case = {"method": row.pop("method"), "placement": row.pop("placement"), "dtype": name, "tokens": tokens}
                    rows.append(case | row)
                    details.append(case | detail)
                save_partial(document, options.output, rows=rows, details=details)
            bench.close()
        del bench, model
    return {"rows": rows, "details": details} | deadline.note()


def benches(model: nn.Module, chosen: Sequence[Entrant], rank: int) -> Iterator[StepBench]:
    """Yields one bench for all entrants, or one for each where a GPU has no room for so many copies. The caller closes each."""
    device = next(model.parameters()).device
    copies = nbytes(list(model.parameters())) * (len(chosen) + 2)
    if device.type == "cuda" and copies > _COPIES_SHARE * torch.cuda.get_device_properties(device).total_memory:
        for entrant in chosen:
            yield StepBench(model, [entrant], rank, published_model=model)
    else:
        yield StepBench(model, chosen, rank)


class StepBench:
    """Measures entrants in turns. Each has a copy of the model, so that none disturbs another; so has the published code.

    Args:
        model: stays at rest; plain forward passes are timed on it.
        published_model: what the published code changes, which is ``model`` itself where memory is short; default: a copy.
    """

    def __init__(
        self,
        model: nn.Module,
        chosen: Sequence[Entrant],
        rank: int,
        published_model: nn.Module | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.model, self.rank = model, rank
        self.clock = clock or clock_for(next(model.parameters()).device)
        self.models = {entrant: _twin(model, share=entrant.probing) for entrant in chosen}
        self.published_model = copy.deepcopy(model) if published_model is None else published_model
        self.published = {
            name: make_published(name, self.published_model, rank) for name in dict.fromkeys(METHODS[e.method] for e in chosen)
        }

    def close(self) -> None:
        """Frees the copies, so that the next bench finds their memory."""
        self.models.clear()
        self.published.clear()
        gc.collect()

    def measure(self, batch: CausalBatch, repeats: int, peer_repeats: int) -> list[tuple[Row, Row]]:
        """Returns a row for each entrant, with its details."""
        # Anew for each batch: a probe chooses its sides by the number of tokens.
        optimizers = {e: make_optimizer(e.method, model, self.rank, e.placement) for e, model in self.models.items()}
        closures = {e: self._closure(e, batch) for e in self.models}
        contenders = self._forwards(batch, any(e.batched for e in self.models))
        for entrant, optimizer in optimizers.items():
            # The call that warms up prepares a probe: it looks where weights are used, and checks what it does.
            if entrant.captured:
                step: Callable[[], object] = capture_step(optimizer, functools.partial(batch, self.models[entrant]))
            else:
                step = functools.partial(closures[entrant].step, optimizer)
            contenders[str(entrant)] = Contender(step)
        contenders |= self._publications(batch, peer_repeats)
        seconds = interleave(contenders, repeats, clock=self.clock)
        base = _faster(seconds)
        found = []
        for entrant, optimizer in optimizers.items():
            row, detail = _rows(entrant, seconds, base, closures[entrant].shares()[-repeats:])
            if entrant.captured:
                detail["forward_bits_in_capture"] = same_in_capture(functools.partial(batch, self.model))
            found.append((row, detail | {"sequences": list(batch.ids.shape)} | self._end(optimizer)))
        return found

    def _closure(self, entrant: Entrant, batch: CausalBatch) -> TimedClosure:
        model = self.models[entrant]
        if entrant.batched:
            return TimedClosure(functools.partial(batch.losses, model), self.clock, batch.ids)
        return TimedClosure(functools.partial(batch, model), self.clock)

    def _forwards(self, batch: CausalBatch, each: bool) -> dict[str, Contender]:
        """Returns two plain forward passes with the model's own loss and, if ``each``, with a loss for each sequence."""

        @torch.no_grad()
        def own() -> None:
            for _ in range(2):
                batch(self.model)

        @torch.no_grad()
        def of_each() -> None:
            for _ in range(2):
                batch.losses(self.model, batch.ids)

        @torch.no_grad()
        def together() -> None:
            batch.losses(self.model, torch.cat([batch.ids, batch.ids]))

        return {_OWN: Contender(own)} | ({_EACH: Contender(of_each), _TOGETHER: Contender(together)} if each else {})

    def _publications(self, batch: CausalBatch, rounds: int) -> dict[str, Contender]:
        @torch.inference_mode()
        def forward() -> Tensor:
            return batch(self.published_model)

        warm_up = not isinstance(self.clock, HostClock)  # the first call on a GPU loads code and grows memory
        return {
            f"published {name}": Contender(functools.partial(step.step, forward), rounds, warm_up)
            for name, step in self.published.items()
        }

    def _end(self, optimizer: ZerothOrderOptimizer) -> Row:
        """Removes the patch. Returns how a probe treated the parameters, and what a merge costs, once in an interval."""
        found = treatment(optimizer)
        if found:
            self.clock.wait()
            start = time.perf_counter()
            optimizer.handle.merge()
            self.clock.wait()
            found["merge_ms"] = round(1e3 * (time.perf_counter() - start), 3)
            found["interval"] = INTERVAL
        optimizer.handle.restore()
        return found


@torch.no_grad()
def same_in_capture(forward: Callable[[], Tensor]) -> bool:
    """Whether a forward pass gives the same bits inside a CUDA graph as outside of one. cuBLAS may choose another algorithm there,
    which is no fault of the step. On the CPU nothing is captured.
    """
    plain = forward()
    if plain.device.type != "cuda":
        return bool(torch.equal(plain, forward()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(plain.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(plain.device)):
        captured = forward()
    graph.replay()
    return bool(torch.equal(plain, captured))


def _twin(model: nn.Module, *, share: bool) -> nn.Module:
    """Copies a model. A probe only reads weights and shares those of the model at rest, because where weights lie in memory is
    worth some percent of a forward pass."""
    twin = copy.deepcopy(model)
    if share:
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data = p.data
    return twin


def _faster(seconds: Mapping[str, Seconds]) -> str:
    """Chooses the forward passes that all steps are compared with."""
    return _EACH if _EACH in seconds and paired_ratio(seconds[_EACH], seconds[_OWN]) < 1.0 else _OWN


def _rows(entrant: Entrant, seconds: Mapping[str, Seconds], base: str, shares: Sequence[float]) -> tuple[Row, Row]:
    step, forwards, reference = seconds[str(entrant)], seconds[base], seconds[f"published {METHODS[entrant.method]}"]
    columns = {"step": step, "two_forwards": forwards, "reference_step": reference}
    name = {"method": entrant.method, "placement": entrant.placement}
    row = {f"{column}_ms": round(1e3 * median(s.values()), 3) for column, s in columns.items()}
    ratio = paired_ratio(step, forwards)
    detail: Row = {
        "times_two_forwards": round(ratio, 4),
        "overhead": round(median(shares), 4) if shares else None,  # nothing in a graph is timed by itself
        "overhead_to_pure_forwards": round(ratio - 1, 4),
        "reference_overhead": round(paired_ratio(reference, forwards) - 1, 4),
        "times_faster": round(paired_ratio(reference, step), 3),
        "forwards": base,
    }
    if entrant.batched:
        detail["together_to_two_forwards"] = round(paired_ratio(seconds[_TOGETHER], forwards), 4)
    if _EACH in seconds:
        detail["forwards_each_to_own"] = round(paired_ratio(seconds[_EACH], seconds[_OWN]), 4)
    return name | row, name | detail | {"seconds": {c: spread(s) for c, s in columns.items()}}


def render(document: Row) -> str:
    """Formats the rows as text."""
    header = (
        "method",
        "placement",
        "dtype",
        "tokens",
        "step ms",
        "two forwards ms",
        "x two forwards",
        "overhead",
        "published ms",
        "its overhead",
        "x published",
    )
    lines = [
        (
            row["method"],
            row["placement"],
            row["dtype"],
            str(row["tokens"]),
            f"{row['step_ms']:.1f}",
            f"{row['two_forwards_ms']:.1f}",
            f"{detail['times_two_forwards']:.3f}",
            number(detail["overhead"], ".1%"),
            f"{row['reference_step_ms']:.0f}",
            f"{detail['reference_overhead']:.0%}",
            f"{detail['times_faster']:.2f}",
        )
        for row, detail in zip(document["rows"], document["details"], strict=True)
    ]
    return text_table([header, *lines], left=3)
