"""Every tiny architecture builds and runs: the coverage test of the engine stands on them."""

import pytest
import torch

from python_tests.architecture_table import ARCHITECTURES, FLOAT32_ONLY
from python_tests.architectures import build, run, unused

pytest.importorskip("transformers")

MOST_PARAMETERS = 300_000


def evaluate(model, inputs):
    with torch.no_grad():
        loss, logits = run(model, inputs)
    assert loss.shape == () and loss.isfinite() and logits.isfinite().all()
    return loss, logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_builds_and_runs(name, rng):
    seed = rng.getrandbits(31)
    model, inputs = build(name, seed=seed)
    assert sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS
    assert not [key for key, p in model.named_parameters() if p.numel() > 1 and p.min() == p.max()]
    assert not [key for key, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p]

    loss, logits = evaluate(model, inputs)
    for again in (evaluate(model, inputs), evaluate(*build(name, seed=seed))):
        assert torch.equal(loss, again[0]) and torch.equal(logits, again[1])

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    assert evaluate(model, inputs)[0] != loss


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FLOAT32_ONLY])
def test_runs_in_bf16(name):
    model, inputs = build(name, dtype=torch.bfloat16)
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    evaluate(model, inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_depends_on_most_parameters(name):
    model, inputs = build(name)
    assert len(unused(model, inputs)) < len(list(model.parameters())) / 2


def test_building_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    build("llama")
    assert torch.equal(before, torch.get_rng_state())
