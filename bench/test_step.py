"""Whole steps for pytest-benchmark: the cases of ``lozo-kernels bench step``.

Without LOZO_BENCH_MODEL (a name as for ``--model``, which needs transformers) a small stack of linear layers stands in.
"""

from __future__ import annotations

import os
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lozo_kernels.bench import batches, entrants, models

CPU = torch.device("cpu")
MODEL = os.environ.get("LOZO_BENCH_MODEL")
TOKENS = [int(n) for n in os.environ.get("LOZO_BENCH_TOKENS", "32").split(",")]
RANK = 4


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 512)
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))
        self.head = nn.Linear(512, 1000)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return types.SimpleNamespace(loss=F.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten()))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build_model(MODEL, torch.bfloat16, CPU) if MODEL else Stack().bfloat16()


@pytest.fixture(params=TOKENS)
def forward(request):
    return batches.CausalBatch(request.param, CPU, 2048)


def test_two_forwards(benchmark, model, forward):
    benchmark.group = "step"
    with torch.no_grad():
        benchmark.pedantic(lambda: (forward(model), forward(model)), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("method", list(entrants.METHODS))
def test_step(benchmark, model, forward, method):
    benchmark.group = "step"
    optimizer = entrants.make_optimizer(method, model, RANK)
    benchmark.pedantic(lambda: optimizer.step(lambda: forward(model)), rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("method", sorted(set(entrants.METHODS.values())))
def test_published_step(benchmark, model, forward, method):
    benchmark.group = "step"
    published = entrants.make_published(method, model, RANK)
    benchmark.pedantic(lambda: published.step(lambda: forward(model)), rounds=3)
