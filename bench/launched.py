"""What each stage of ``bench.stages`` launches, found by making its calls on CPU tensors that nothing reads."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench.ahead import Note, RecordingBackend
from bench.exactness import KERNEL_RANKS
from lozo_kernels import LOZO, MeZO, SubZero, capture_step
from lozo_kernels.bench import cases, layer_cases, models, tune
from lozo_kernels.bench.arguments import DTYPE_NAMES
from lozo_kernels.bench.batches import CausalBatch
from lozo_kernels.bench.correctness import plans
from lozo_kernels.bench.entrants import BETA, EPS, LR, PLACEMENTS
from lozo_kernels.bench.gate import small_call
from lozo_kernels.bench.op_calls import Weights, dense_calls, lowrank_calls
from lozo_kernels.kernels import ops
from lozo_kernels.kernels.backends import launches
from lozo_kernels.kernels.calls import Draw, LayerCall
from lozo_kernels.kernels.registry import registered
from lozo_kernels.kernels.table import DTYPES, TensorTable
from lozo_kernels.model.probe.choosing import preparation
from lozo_kernels.model.probe.choosing.cost import Costs, measure_costs
from lozo_kernels.optim.optimizer import ZerothOrderOptimizer

_NARROW = "opt-tiny"
"""The model that takes a probe's steps here. Its extents are multiples of 16, as those of real models are."""


def correctness(note: Note, device_name: str | None, *, quick: bool = False) -> None:
    """``bench correctness``, and the factors that it looks at."""
    backend = RecordingBackend(note, device_name)
    for stream, rank in (("U", 4), ("V", 1), ("S", 17), ("U", 64)):
        ops.factor(0, 133, rank, 1, Draw(1), stream=stream, device="cpu", backend=backend)
    with mock.patch.object(cases, "strided", _untouched), mock.patch.object(layer_cases, "strided", _untouched):
        for plan in plans(quick=quick):
            plan.case(0).run(backend)


def tests(note: Note, device_name: str | None) -> None:
    """``python_tests/test_gpu.py`` and ``test_graphs.py``: models like theirs, with every kind of step that they take."""
    kinds: tuple[dict[str, object], ...] = ({}, {"momentum": 0.9, "weight_decay": 0.1}, {"fuse_steps": True}, {"directions": 2})
    with noting(note, device_name, compute=True) as name, all_aligned():
        for dtype in DTYPES:
            for method in (LOZO, MeZO, SubZero):
                for more in (*kinds, *({"rounding": "stochastic"} for _ in range(dtype == torch.bfloat16))):
                    _steps(dtype, lambda model, method=method, more=more: method(model, backend=name, **more))
        for placed in list(PLACEMENTS.values())[1:]:
            _steps(torch.float32, lambda model, placed=placed: LOZO(model, interval=2, backend=name, **placed))


def exactness(note: Note, device_name: str | None, ranks: Sequence[int] = KERNEL_RANKS) -> None:
    """``bench exactness``."""
    backend = RecordingBackend(note, device_name)
    for rank in ranks:
        table = TensorTable([torch.empty(1, 1024, 1024)], [0], v=[torch.empty(1, rank, 1024, dtype=torch.float16)])
        ops.lowrank_update_(table, seed=0, draws=[Draw(0)], scales=1.0, backend=backend)


def throughput(note: Note, device_name: str | None, labels: Sequence[str], dtypes: Sequence[str], ranks: Sequence[int]) -> None:
    """``bench perturb``."""
    backend = RecordingBackend(note, device_name)
    for label in labels:
        for dtype in (DTYPE_NAMES[name] for name in dtypes):
            weights = _empty_weights(label, dtype)
            calls = dict(dense_calls(weights.dense_table(), backend))
            for rank in (0, *ranks):
                if rank:
                    calls = lowrank_calls(weights.lowrank_table(rank, backend), backend)
                for name, call in calls.items():
                    small_call(name, dtype, call).run()
                    call.run()


def step(note: Note, device_name: str | None, methods: Sequence[str]) -> None:
    """``bench step`` in place, ``memory`` and ``fits``: in bf16, on models whose weights are all aligned."""
    with noting(note, device_name) as name, all_aligned():
        for method in methods:
            model = _narrow_model()
            options = {"momentum": BETA if method.endswith("-m") else 0.0, "backend": name, "lr": LR, "eps": EPS}
            if method.startswith("mezo"):
                optimizer = MeZO(model, **options)
            else:
                optimizer = LOZO(model, rank=4, interval=2, fuse_steps=method == "lozo-fused", **options)
            for _ in range(3):
                optimizer.step(lambda: torch.ones(()))
            capture_step(optimizer, lambda: torch.ones(()))()
            optimizer.handle.restore()


def probe(note: Note, device_name: str | None, labels: Sequence[str], tokens: Sequence[int], length: int) -> None:
    """``bench step`` of probes: a narrow model takes the steps, and its calls on activations are made again in each real width."""
    extents = ("hidden_size", "ffn_dim", "vocab_size")
    widths = [{models.MODELS[_NARROW].settings[e]: models.MODELS[label].settings[e] for e in extents} for label in labels]
    wide = RecordingBackend(note, device_name)

    def again(call: LayerCall, lookup: bool) -> None:
        for real in widths:
            _widened(call, real, wide, lookup)

    with noting(note, device_name, compute=True, layer=again) as name, all_aligned():
        for count in tokens:
            batch = CausalBatch(count, torch.device("cpu"), models.MODELS[_NARROW].positions, length, sequences=2)
            for placement in ("probe", "probe-activation", "probe-scratch", "batched"):
                _probed_steps(batch, placement, name)


def _probed_steps(batch: CausalBatch, placement: str, backend: str) -> None:
    """Takes steps across two windows, with a closure like that of ``bench step``."""
    model = _narrow_model()
    optimizer = LOZO(model, rank=4, interval=2, lr=LR, eps=EPS, backend=backend, **PLACEMENTS[placement])
    for _ in range(3):
        if placement == "batched":
            optimizer.step(lambda ids: batch.losses(model, ids), batch.ids)
        else:
            optimizer.step(lambda: batch(model))
    optimizer.handle.restore()


def tuning(note: Note, device_name: str | None) -> None:
    """``lozo-kernels tune``."""
    for kernel, rank in tune.cases():
        for size in tune.candidates(kernel):
            backend = RecordingBackend(note, device_name, sizes={kernel: size})
            weights = _empty_weights(tune.SHAPE, torch.bfloat16)
            if rank:
                call = lowrank_calls(weights.lowrank_table(rank, backend), backend)[kernel]
            else:
                call = dense_calls(weights.dense_table(), backend)[kernel]
            small_call(kernel, torch.bfloat16, call).run()
            call.run()


@contextlib.contextmanager
def noting(
    note: Note, device_name: str | None, *, compute: bool = False, layer: Callable[[LayerCall, bool], None] | None = None
) -> Iterator[str]:
    """Registers a backend that notes launches; yields its name. A probe that measures its sides takes the activation's."""
    backend = RecordingBackend(note, device_name, compute=compute, layer=layer)
    with registered(backend), mock.patch.object(preparation, "measure_costs", _activations_are_cheap):
        yield backend.name


def _activations_are_cheap(*arguments: Any) -> Costs:
    """Measures, for the launches of it. What it measured here would be chance, and another process would launch other kernels."""
    measure_costs(*arguments)
    return Costs(0.0, 0.0, 1.0, 1.0)


@contextlib.contextmanager
def all_aligned() -> Iterator[None]:
    """Small weights take the launches of large ones."""
    with mock.patch.object(launches, "_LEAST_BYTES", 0):
        yield


def _empty_weights(label: str, dtype: torch.dtype) -> Weights:
    """Makes one weight of each shape of a model, or the matrix "RxC", in memory that is never touched."""
    if label in models.MODELS:
        shapes = list(dict.fromkeys(shape for _, shape in models.parameter_shapes(label)))
    else:
        shapes = [tuple(map(int, label.split("x")))]
    tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
    return Weights(label, [x for x in tensors if x.dim() == 2], [x for x in tensors if x.dim() == 1])


def _narrow_model() -> nn.Module:
    return models.build_model(_NARROW, torch.bfloat16, torch.device("cpu"))


def _gpu_test_model(dtype: torch.dtype) -> nn.Module:
    """A model some of whose weights allow 128-bit access, as in the tests."""
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 7)).to(dtype)


def _untouched(rng: random.Random, shape: Sequence[int], dtype: torch.dtype, *, step: int = 1, **_: object) -> torch.Tensor:
    """Makes a tensor like ``cases.strided``, but fills it with nothing: the values change no launch."""
    batch, rows, cols = shape
    row_stride = cols + step * rng.choice((0, 1, 3))
    storage = torch.zeros(batch * rows * row_stride + 64, dtype=dtype)
    return storage.as_strided(tuple(shape), (rows * row_stride, row_stride, 1), step * rng.choice((0, 1)))


def _steps(dtype: torch.dtype, make: Callable[[nn.Module], ZerothOrderOptimizer]) -> None:
    model, x = _gpu_test_model(dtype), torch.zeros(4, 64, dtype=dtype)
    optimizer = make(model)
    for _ in range(3):
        optimizer.step(lambda x: model(x).float().square().mean(-1), x)
    optimizer.handle.restore()


def _widened(call: LayerCall, widths: dict[int, int], backend: RecordingBackend, lookup: bool) -> None:
    """Makes a call again with extents of a real model, in memory that is never touched."""

    y = torch.empty(call.y.shape[0], widths.get(call.y.shape[1], call.y.shape[1]), dtype=call.y.dtype)
    x = call.x if lookup else torch.empty(call.x.shape[0], widths.get(call.x.shape[1], call.x.shape[1]), dtype=call.x.dtype)
    v = torch.empty(call.v.shape[0], widths.get(call.v.shape[1], call.v.shape[1]), dtype=call.v.dtype)
    b = torch.empty(widths.get(call.b.shape[0], call.b.shape[0]), call.b.shape[1])
    shift = None if call.shift is None else torch.empty(len(call.shift), y.shape[1])
    made = dataclasses.replace(call, y=y, x=x, v=v, b=b, shift=shift)
    (backend.lowrank_embedding_ if lookup else backend.lowrank_linear_)(made)
