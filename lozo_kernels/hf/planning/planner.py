"""``lozo-kernels plan``: memory and time of training a model, from its configuration alone."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import InputError, require
from ...model.config import PatchConfig
from ...model.probe.members import Member
from ...model.text_table import mebibytes
from ...optim.optimizer import ZerothOrderOptimizer
from ..methods import ZEROTH_ORDER, Method
from ..models.pretrained import open_config
from .machine import Machine, given_machine, measured_machine
from .state_bytes import State, find_members, place_members, side_seconds, state_in_place, state_of_probe
from .workload import Workload

if TYPE_CHECKING:
    from .dry_run import DryModel

_FT_FORWARDS = 3  # a backward pass costs two
_DRAWS = 3
_ADAMW_TRAFFIC = 7  # reads weight, gradient and two moments, writes weight and moments


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One way to train.

    Attributes:
        placement: "probe" or "inplace"; None for backpropagation.
        state: what it keeps beside weights and activations; nothing for backpropagation, whose ``activation_bytes`` hold all.
        activation_bytes: the most alive at once beyond weights and state.
        step_seconds: duration of a step; ``forward_seconds``: of its forward (and backward) passes alone.
        sides: how many parameters take each side of a probe.
    """

    placement: str | None
    state: State
    activation_bytes: int
    step_seconds: float
    forward_seconds: float
    sides: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Workload):
    """What training a model takes, in bytes and seconds, beside the workload that it was asked for.

    Attributes:
        model: the name of the model, or of its class.
        architecture: the class that was built.
        parameters: their number, tied ones counted once; ``weight_bytes`` their bytes, ``buffer_bytes`` those of the buffers.
        tokens, flops: tokens (or images) and floating-point operations of one forward pass.
        activation_bytes: the most alive at once in one forward pass beyond the weights, its logits and loss included.
        machine: the speeds that times are worked out with.
        options: the placements that the method has, the chosen one first; its reason is ``why``.
        finetuning: backpropagation with AdamW in the same dtype.
    """

    model: str
    architecture: str
    parameters: int
    weight_bytes: int
    buffer_bytes: int
    tokens: int
    flops: int
    activation_bytes: int
    machine: Machine
    options: tuple[Alternative, ...]
    why: str
    finetuning: Alternative

    @property
    def inference_bytes(self) -> int:
        """Weights, buffers and a forward pass."""
        return self.weight_bytes + self.buffer_bytes + self.activation_bytes

    def total_bytes(self, option: Alternative) -> int:
        """Peak of a step."""
        return self.weight_bytes + self.buffer_bytes + option.activation_bytes + option.state.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values, totals included."""
        values = dataclasses.asdict(self)
        for option, shown in zip((*self.options, self.finetuning), (*values["options"], values["finetuning"]), strict=True):
            shown["total_bytes"] = self.total_bytes(option)
            shown["first_step_bytes"] = self.total_bytes(option) + option.state.first_step
        return values | {"placement": self.options[0].placement, "inference_bytes": self.inference_bytes}


def plan(model: str | Any, *, say: Callable[[str], None] | None = None, **workload: Any) -> Plan:
    """Memory and time of training a model, without its weights.

    Args:
        model: name on the Hub, a folder with config.json, or a configuration of transformers.
        say: is told when this machine is measured, which takes some seconds.
        workload: fields of :class:`~lozo_kernels.hf.planning.workload.Workload`: method, rank, interval, dtype, batch_size,
            sequence_length, placement, trust_remote_code, device_bandwidth, device_tflops.

    Raises:
        TypeError: the model is neither a name nor a configuration, or a keyword is no field of a workload.
        InputError: a value is out of range, or the model cannot be built or run without its weights.
    """
    asked = Workload(**workload)
    from .dry_run import DryModel

    dtype = getattr(torch, asked.dtype)
    name, config = _config_of(model, asked.trust_remote_code)
    dry = DryModel(config, dtype, asked.batch_size, asked.sequence_length, trusted=asked.trust_remote_code)
    forward = dry.forward()
    parameters = list(dry.model.parameters())
    weight_bytes = sum(p.nbytes for p in parameters)
    method = ZEROTH_ORDER.get(asked.method)
    if say is not None and asked.device_bandwidth is None:
        say("measuring this machine; with --device-bandwidth times are worked out from that instead")
    machine = _machine(asked, dtype, method)
    forward_seconds = machine.forward_seconds(forward.flops, weight_bytes)
    passes = _FT_FORWARDS * forward_seconds
    update = _ADAMW_TRAFFIC * weight_bytes / machine.bandwidth
    finetuning = Alternative(None, State(), dry.backpropagation(), passes + update, passes, {})
    options: tuple[Alternative, ...] = (finetuning,)
    why = "backpropagation moves weights by their gradients"
    if method is not None:
        count = method.passes(method.directions, method.one_sided, method.evaluation)
        options, why = _Planner(dry, method, asked, machine, forward.bytes, count * forward_seconds).options()
    return Plan(
        **vars(asked),
        model=name,
        architecture=type(dry.model).__name__,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=weight_bytes,
        buffer_bytes=sum(b.nbytes for b in dry.model.buffers()),
        tokens=dry.tokens,
        flops=forward.flops,
        activation_bytes=forward.bytes,
        machine=machine,
        options=options,
        why=why,
        finetuning=finetuning,
    )


@dataclasses.dataclass
class _Planner:
    """The placements of one method."""

    dry: DryModel
    method: Method
    asked: Workload
    machine: Machine
    activation_bytes: int
    forwards: float

    def options(self) -> tuple[tuple[Alternative, ...], str]:
        """All placements, the one to take first, and the reason for it."""
        probe, moving = self._probe(), self._in_place()
        if self.asked.placement != "auto":
            return (probe, moving) if self.asked.placement == "probe" else (moving, probe), "asked for"
        more = probe.state.total - moving.state.total
        memory = f"{mebibytes(abs(more), ',.1f', ' MiB')} {'more' if more >= 0 else 'less'} memory"
        return (probe, moving), (
            f"weights stay exact to the bit between merges; a step {1e3 * probe.step_seconds:.1f} ms against "
            f"{1e3 * moving.step_seconds:.1f} ms in place, {memory}"
        )

    def _config(self) -> PatchConfig:
        estimator, rank, interval = self.method.estimator, self.asked.rank, self.asked.interval
        return PatchConfig(estimator=estimator, rank=rank, interval=interval, placement="probe")

    def _members(self) -> list[Member]:
        try:
            with self.dry.mode:
                return find_members(self.dry, self._config())
        except (TypeError, ValueError) as e:
            raise InputError(f"this model cannot be trained so: {e}") from None

    def _in_place(self) -> Alternative:
        members = self._members()
        state = state_in_place(self.dry.model, members, self._config(), momentum=bool(self.method.momentum))
        passes = self.machine.passes * sum(m.numel for m in members)
        return Alternative("inplace", state, self.activation_bytes, self.forwards + passes, self.forwards, {})

    def _probe(self) -> Alternative:
        members, costs, dense = self._members(), self.machine.costs, self.method.estimator == "dense"
        if dense:  # noise of every element is what costs: a fused step in place draws it three times
            costs = dataclasses.replace(costs, element=max(costs.element, self.machine.passes / _DRAWS))
        uses = place_members(self.dry, members, costs, self._config())
        state = state_of_probe(self.dry.model, members, self._config(), momentum=bool(self.method.momentum))
        evaluation = sum(side_seconds(m, uses[m], costs) for m in members)
        # What was learned is merged once an interval; without factors every step's update is a pass over the weights.
        merging = sum(m.numel for m in members) * costs.element
        moved = self.method.directions * (1 if self.method.one_sided else 2)
        step = self.forwards + moved * evaluation + (merging if dense else merging / self.asked.interval)
        sides = dict(collections.Counter(str(m.side) for m in members))
        return Alternative("probe", state, self.activation_bytes, step, self.forwards, sides)


def _machine(asked: Workload, dtype: torch.dtype, method: Method | None) -> Machine:
    if asked.device_bandwidth is not None:
        flops = None if asked.device_tflops is None else 1e12 * asked.device_tflops
        return given_machine(1e9 * asked.device_bandwidth, flops, dtype)

    def make_optimizer(model: nn.Module) -> ZerothOrderOptimizer:
        """The optimiser whose passes are timed: it moves weights in place, and no window ends."""
        assert method is not None and method.optimizer is not None
        options: dict[str, Any] = {"momentum": method.momentum, "rank": asked.rank, "interval": 2**31}
        options = {n: v for n, v in options.items() if n in method.uses} | {"directions": method.directions}
        return method.optimizer(model, lr=0.0, fuse_steps=True, two_sided=not method.one_sided, **options)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return measured_machine(device, dtype, asked.rank, None if method is None else make_optimizer)


def _config_of(model: Any, trusted: bool) -> tuple[str, Any]:
    """The name of a model, and its configuration."""
    if isinstance(model, (str, os.PathLike)) and isinstance(os.fspath(model), str):
        return os.fspath(model), open_config(os.fspath(model), "configuration", trusted=trusted)
    if isinstance(model, require("transformers").PretrainedConfig):
        return type(model).__name__, model
    raise TypeError(f"plan() takes a name on the Hub, a folder or a configuration of transformers, not {model!r}")
