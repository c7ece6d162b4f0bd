"""The probe on every architecture of the table, on both sides."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from lozo_kernels import LOZO  # noqa: E402
from python_tests.architecture_table import ARCHITECTURES  # noqa: E402
from python_tests.architectures import build, run  # noqa: E402
from python_tests.coverage import check  # noqa: E402

RELATIVE = 1e-5  # of the shift, in fp32


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_activation_side_is_exact(name):
    found = check(name, "activation")
    assert not found.demoted and "inplace" not in found.sides
    assert found.untouched
    assert found.logits_error <= RELATIVE and found.loss_error <= RELATIVE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scratch_gives_the_bits_of_materialised_weights(name):
    found = check(name, "scratch")
    assert not found.demoted and "inplace" not in found.sides and "activation" not in found.sides
    assert found.untouched and found.same_bits


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "vit", "mixtral", "mamba", "t5", "gemma3_text"])
def test_subzero_has_the_bits_of_materialised_weights(name):
    found = check(name, "auto", estimator="subspace")
    assert not found.demoted and set(found.sides) <= {"scratch", "copy"}
    assert found.untouched and found.same_bits


def test_enough_architectures_of_every_family():
    families = {a.family for a in ARCHITECTURES.values()}
    assert len(ARCHITECTURES) >= 60
    assert families >= {"decoder", "encoder", "seq2seq", "vision", "moe", "state-space"}


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert", "vit", "mixtral", "mamba", "t5"])
def test_steps_go_where_steps_in_place_go(name):
    finals = []
    for placement in ("inplace", "probe"):
        model, inputs = build(name)
        run(model, inputs)
        optimizer = LOZO(model, placement=placement, lr=1e-3, eps=1e-3, rank=2, interval=3)
        for _ in range(5):
            optimizer.step(lambda model=model, inputs=inputs: run(model, inputs)[0])
        optimizer.handle.restore()
        finals.append({n: p.detach().clone() for n, p in model.named_parameters()})
    start, _ = build(name)
    for n, p in start.named_parameters():
        moved = (finals[0][n] - p).norm()
        assert (finals[1][n] - finals[0][n]).norm() <= 0.05 * moved + 1e-6, n


def test_a_model_whose_embeddings_are_rescaled_is_not_fooled():
    """Gemma multiplies what its embedding returns: the side must be that of the module, not of nn.Embedding."""
    model, inputs = build("gemma3_text")
    run(model, inputs)
    optimizer = LOZO(model, placement="probe", side="activation", rank=2)
    optimizer.step(lambda: run(model, inputs)[0])
    table = next(m for m in optimizer.handle.members if "embed" in m.name)
    assert table.side == "copy" and "uses it in its own way" in table.reason
    assert torch.isfinite(optimizer.info.c).all()
