"""``lozo-kernels plan``: memory and time of training a model, from its configuration alone."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import InputError, require
from ...kernels.noise import MAX_RANK
from ...model.config import PLACEMENTS, PatchConfig
from ...model.probe.members import Member
from ...optim.optimizer import LOZO, MeZO, SubZero, ZerothOrderOptimizer
from .machine import Machine, given_machine, measured_machine
from .state import State, find_members, place_members, side_seconds, state_in_place, state_of_probe

if TYPE_CHECKING:
    from .dry_run import DryModel

DTYPES = ("float32", "bfloat16", "float16")
_FT_FORWARDS = 3  # a backward pass costs two
_DRAWS = 3
_ADAMW_TRAFFIC = 7  # reads weight, gradient and two moments, writes weight and moments


@dataclasses.dataclass(frozen=True)
class _Method:
    """A zeroth-order method, as far as its memory and time are concerned. ``estimator`` as in :class:`PatchConfig`."""

    estimator: str = "lowrank"
    momentum: float = 0.0

    def make_optimizer(self, model: nn.Module, rank: int) -> ZerothOrderOptimizer:
        """The one whose passes are timed: within a window, weights in place."""
        if self.estimator == "dense":
            return MeZO(model, lr=0.0, momentum=self.momentum, fuse_steps=True)
        cls = SubZero if self.estimator == "subspace" else LOZO
        return cls(model, lr=0.0, momentum=self.momentum, rank=rank, interval=2**31, fuse_steps=True)


_METHODS = {
    "lozo": _Method(),
    "lozo-m": _Method(momentum=0.9),
    "mezo": _Method("dense"),
    "mezo-m": _Method("dense", momentum=0.9),
    "subzero": _Method("subspace"),
}
METHODS = (*_METHODS, "ft")


@dataclasses.dataclass(frozen=True)
class Option:
    """One way to train.

    Attributes:
        placement: "probe" or "inplace"; None for backpropagation.
        state: what it keeps beside weights and activations; for backpropagation nothing, its ``activation_bytes`` have all.
        activation_bytes: the most alive at once beyond weights and state.
        step_seconds: of a step; ``forward_seconds``: of its forward (and backward) passes alone.
        sides: of a probe, how many parameters take each side.
    """

    placement: str | None
    state: State
    activation_bytes: int
    step_seconds: float
    forward_seconds: float
    sides: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What training a model takes. Bytes and seconds.

    Attributes:
        model, method, dtype, batch_size, sequence_length, rank, interval: as asked.
        architecture: the class that was built.
        parameters, weight_bytes: of all parameters, tied ones once; ``buffer_bytes``: tables that come with them.
        tokens, flops: of one forward pass.
        activation_bytes: the most alive at once in one forward pass beyond the weights, its logits and loss included.
        machine: the speeds that times are worked out with.
        options: the placements that the method has, the chosen one first; its reason is ``why``.
        finetuning: backpropagation with AdamW in the same dtype.
    """

    model: str
    method: str
    dtype: str
    batch_size: int
    sequence_length: int
    rank: int
    interval: int
    architecture: str
    parameters: int
    weight_bytes: int
    buffer_bytes: int
    tokens: int
    flops: int
    activation_bytes: int
    machine: Machine
    options: tuple[Option, ...]
    why: str
    finetuning: Option

    @property
    def inference_bytes(self) -> int:
        """Weights, buffers and a forward pass."""
        return self.weight_bytes + self.buffer_bytes + self.activation_bytes

    def total_bytes(self, option: Option) -> int:
        """Peak of a step."""
        return self.weight_bytes + self.buffer_bytes + option.activation_bytes + option.state.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, totals included."""
        values = dataclasses.asdict(self)
        for option, shown in zip((*self.options, self.finetuning), (*values["options"], values["finetuning"]), strict=True):
            shown["total_bytes"] = self.total_bytes(option)
            shown["first_step_bytes"] = self.total_bytes(option) + option.state.first_step
        return values | {"placement": self.options[0].placement, "inference_bytes": self.inference_bytes}


def plan(
    model: str | Any,
    *,
    method: str = "lozo",
    rank: int = 2,
    interval: int = 50,
    dtype: str = "bfloat16",
    batch_size: int = 16,
    sequence_length: int = 256,
    placement: str = "auto",
    device_bandwidth: float | None = None,
    device_tflops: float | None = None,
) -> Plan:
    """Memory and time of training a model, without its weights.

    Args:
        model: name on the Hub, a folder with config.json, or a configuration of transformers.
        method: lozo, lozo-m, mezo, mezo-m, subzero or ft (backpropagation with AdamW).
        rank, interval, placement: as :class:`lozo_kernels.PatchConfig` takes them.
        dtype: of the weights: float32, bfloat16 or float16.
        batch_size, sequence_length: of one forward pass.
        device_bandwidth: GB/s of the device that is planned for; None measures this machine.
        device_tflops: 1e12 operations per second of its matrix products in ``dtype``; without it a given device's forward passes
            are taken to wait for memory alone.

    Raises:
        TypeError: the model is neither a name nor a configuration.
        InputError: a value is out of range, or the model cannot be built or run without its weights.
    """
    _check(method, rank, interval, dtype, batch_size, sequence_length, placement, device_bandwidth, device_tflops)
    from .dry_run import DryModel

    torch_dtype = getattr(torch, dtype)
    name, config = _open_config(model)
    dry = DryModel(config, torch_dtype, batch_size, sequence_length)
    forward = dry.forward()
    parameters = list(dry.model.parameters())
    weight_bytes = sum(p.nbytes for p in parameters)
    known = _METHODS.get(method)
    if device_bandwidth is not None:
        flops = None if device_tflops is None else 1e12 * device_tflops
        machine = given_machine(1e9 * device_bandwidth, flops, torch_dtype)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        make = None if known is None else functools.partial(known.make_optimizer, rank=rank)
        machine = measured_machine(device, torch_dtype, rank, make)

    def seconds(flops: int) -> float:
        return machine.forward_seconds(flops, weight_bytes)

    backward = dry.backpropagation()
    passes = _FT_FORWARDS * seconds(forward.flops)
    finetuning = Option(None, State(), backward, passes + _ADAMW_TRAFFIC * weight_bytes / machine.bandwidth, passes, {})
    options: tuple[Option, ...] = (finetuning,)
    why = "backpropagation moves weights by their gradients"
    if known is not None:
        planner = _Planner(dry, known, rank, interval, machine, forward.bytes, 2 * seconds(forward.flops))
        options, why = planner.options(placement)
    return Plan(
        name,
        method,
        dtype,
        batch_size,
        sequence_length,
        rank,
        interval,
        type(dry.model).__name__,
        sum(p.numel() for p in parameters),
        weight_bytes,
        sum(b.nbytes for b in dry.model.buffers()),
        dry.tokens,
        forward.flops,
        forward.bytes,
        machine,
        options,
        why,
        finetuning,
    )


@dataclasses.dataclass
class _Planner:
    """The placements of one method."""

    dry: DryModel
    method: _Method
    rank: int
    interval: int
    machine: Machine
    activation_bytes: int
    forwards: float

    def options(self, asked: str) -> tuple[tuple[Option, ...], str]:
        """All of them, the one to take first, and why."""
        probe, moving = self._probe(), self._in_place()
        if asked != "auto":
            return (probe, moving) if asked == "probe" else (moving, probe), "asked for"
        more = probe.state.total - moving.state.total
        return (probe, moving), (
            f"weights stay exact to the bit between merges; a step {_milliseconds(probe.step_seconds)} against "
            f"{_milliseconds(moving.step_seconds)} in place, {_size(abs(more))} {'more' if more >= 0 else 'less'} memory"
        )

    def _config(self) -> PatchConfig:
        return PatchConfig(estimator=self.method.estimator, rank=self.rank, interval=self.interval, placement="probe")

    def _members(self) -> list[Member]:
        try:
            with self.dry.mode:
                return find_members(self.dry, self._config())
        except (TypeError, ValueError) as e:
            raise InputError(f"this model cannot be trained so: {e}") from None

    def _in_place(self) -> Option:
        members = self._members()
        state = state_in_place(members, self._config(), momentum=bool(self.method.momentum))
        passes = self.machine.passes * sum(m.numel for m in members)
        return Option("inplace", state, self.activation_bytes, self.forwards + passes, self.forwards, {})

    def _probe(self) -> Option:
        members, costs, dense = self._members(), self.machine.costs, self.method.estimator == "dense"
        if dense:  # noise of every element is what costs: a fused step in place draws it three times
            costs = dataclasses.replace(costs, element=max(costs.element, self.machine.passes / _DRAWS))
        uses = place_members(self.dry, members, costs, self._config())
        state = state_of_probe(self.dry.model, members, self._config(), momentum=bool(self.method.momentum))
        evaluation = sum(side_seconds(m, uses[m], costs) for m in members)
        # What was learned is merged once an interval; without factors every step's update is a pass over the weights.
        merging = sum(m.numel for m in members) * costs.element
        step = self.forwards + 2 * evaluation + (merging if dense else merging / self.interval)
        sides = dict(collections.Counter(str(m.side) for m in members))
        return Option("probe", state, self.activation_bytes, step, self.forwards, sides)


def report(plan: Plan) -> str:
    """The plan for a reader."""
    p = plan
    lines = [
        f"{p.model}: {p.architecture}, {p.parameters:,} parameters in {p.dtype}",
        f"{p.method}, rank {p.rank}, interval {p.interval}; a forward pass: {p.tokens:,} tokens, {p.flops / 1e12:.3g} TFLOP",
        "",
    ]
    chosen, *others = p.options
    columns = [("inference", None), *((o.placement or "ft", o) for o in p.options)]
    if p.method != "ft":
        columns.append(("ft (AdamW)", p.finetuning))
    rows = [
        ("weights and buffers", [p.weight_bytes + p.buffer_bytes] * len(columns)),
        ("activations", [p.activation_bytes if o is None else o.activation_bytes for _, o in columns]),
    ]
    rows += [
        (name, [0 if o is None else getattr(o.state, field) for _, o in columns])
        for name, field in (("factors", "factors"), ("momentum", "momentum"), ("scratch", "scratch"), ("copies", "copies"))
    ]
    totals = [p.inference_bytes if o is None else p.total_bytes(o) for _, o in columns]
    lines.append(f"{'MiB':26}" + "".join(f"{name:>16}" for name, _ in columns))
    lines += [f"{name:26}" + "".join(f"{_mebibytes(v):>16}" for v in values) for name, values in rows if any(values)]
    lines.append(f"{'in all':26}" + "".join(f"{_mebibytes(v):>16}" for v in totals))
    lines.append(f"{'of inference':26}" + "".join(f"{v / p.inference_bytes:>16.3f}" for v in totals))
    first = [0 if o is None else o.state.first_step for _, o in columns]
    if any(first):
        lines.append(f"{'first step, which checks':26}" + "".join(f"{_mebibytes(v) if v else '':>16}" for v in first).rstrip())
    forwards = [p.machine.forward_seconds(p.flops, p.weight_bytes), *(o.forward_seconds for _, o in columns if o is not None)]
    steps = [None, *(o.step_seconds for _, o in columns if o is not None)]
    lines += [
        "",
        f"{'ms':26}" + "".join(f"{name:>16}" for name, _ in columns),
        f"{'forward (and backward)':26}" + "".join(f"{1e3 * v:>16.1f}" for v in forwards),
        f"{'a step':26}" + "".join(f"{'' if v is None else format(1e3 * v, '.1f'):>16}" for v in steps),
        "",
    ]
    if chosen.placement is not None:
        lines.append(f"placement: {chosen.placement} ({p.why})")
        lines += [f"sides: {_spell(o.sides)}" for o in (chosen, *others) if o.sides]
    lines.append(f"speeds: {p.machine.source}: {p.machine.bandwidth / 1e9:.1f} GB/s, {_flops(p.machine.flops)}")
    return "\n".join(lines)


def _open_config(model: str | Any) -> tuple[str, Any]:
    transformers = require("transformers")
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str):
        if not isinstance(model, transformers.PretrainedConfig):
            raise TypeError(f"plan() takes a name on the Hub, a folder or a configuration of transformers, not {model!r}")
        return type(model).__name__, model
    transformers.utils.logging.set_verbosity_error()
    try:
        return model, transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        where = "in that folder" if Path(model).is_dir() else "as a folder or on the Hub"
        first = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise InputError(f"--model {model}: no usable configuration {where}: {first}") from None


def _check(
    method: str,
    rank: int,
    interval: int,
    dtype: str,
    batch_size: int,
    sequence_length: int,
    placement: str,
    bandwidth: float | None,
    tflops: float | None,
) -> None:
    words = (("method", method, METHODS), ("dtype", dtype, DTYPES), ("placement", placement, PLACEMENTS))
    for name, word, known in words:
        if word not in known:
            raise InputError(f"--{name} {word!r} is not known; there are {', '.join(known)}")
    counts = (("rank", rank), ("interval", interval), ("batch-size", batch_size), ("sequence-length", sequence_length))
    for name, count in counts:
        if count < 1:
            raise InputError(f"--{name} is at least 1, not {count}")
    if rank > MAX_RANK:
        raise InputError(f"--rank is at most {MAX_RANK}, not {rank}")
    for name, value in (("device-bandwidth", bandwidth), ("device-tflops", tflops)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name} is a finite number above 0, not {value}")
    if tflops is not None and bandwidth is None:
        raise InputError("--device-tflops goes with --device-bandwidth")


def _spell(sides: dict[str, int]) -> str:
    return ", ".join(f"{count} on {side}" for side, count in sorted(sides.items(), key=lambda pair: -pair[1]))


def _flops(flops: float | None) -> str:
    return (
        "forward passes at the speed of reading the weights (give --device-tflops)"
        if flops is None
        else f"{flops / 1e12:.3g} TFLOP/s"
    )


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.2f}" if value else "-"


def _size(value: int) -> str:
    return f"{value / 2**20:,.1f} MiB"


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.1f} ms"
