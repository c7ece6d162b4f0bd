"""Runs that are killed and go on from their journals."""

import copy
import os

import pytest
import torch

from lozo_kernels import LOZO
from lozo_kernels.journal import End, Journal, JournalError, diff, read_journal
from python_tests.fuzz.journal_kills import KINDS, kill_runs, small
from python_tests.journal_helpers import zoo
from python_tests.models import same, weights, zoo_loss

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed that were forked")


def llama():
    """A decoder of transformers, of 5,000 parameters."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=17, num_key_value_heads=1, **sizes)).eval()


@pytest.mark.parametrize(("build", "kills", "steps"), [(small, 10, 150), (llama, 3, 60)])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_in_the_bits_of_the_run_that_was_not(tmp_path, rng, kind, build, kills, steps):
    """65 kills in all, of a model of torch and of one of transformers; ``python -m bench.journal --kills N`` makes more."""
    found = kill_runs(kind, kills, tmp_path, rng, steps=steps, build=build)
    assert found["kills"] == kills


@pytest.mark.parametrize("options", [{"fuse_steps": True, "momentum": 0.5}, {"placement": "probe", "momentum": 0.5}])
@pytest.mark.parametrize("stop", [1, 6, 9])
def test_a_run_goes_on_from_any_step(tmp_path, rng, options, stop):
    """Also from the middle of one that came to its end, and with a record that was cut in the middle."""

    def run(path, first, steps):
        torch.manual_seed(3)
        model = zoo()
        optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=4, **options)
        if path.exists():
            assert Journal.resume(path, optimizer, upto=first) == first
        else:
            Journal.create(path, optimizer)
        for step in range(first, steps):
            if step == 6:
                zoo_loss(model)()
                model.state_dict()
            optimizer.step(zoo_loss(model, step))
        optimizer.journal.finish()
        optimizer.handle.restore()
        return weights(model)

    whole = run(tmp_path / "whole", 0, 12)
    parts = tmp_path / "parts"
    run(parts, 0, stop)
    assert isinstance(read_journal(parts).records[-1], End)
    assert same(run(parts, stop, 12), whole)
    assert diff(parts, tmp_path / "whole") is None
    assert same(run(parts, stop, 12), whole)
    data = parts.read_bytes()
    parts.write_bytes(data[:-45])  # its end and some bytes of the last step
    torn = read_journal(parts)
    assert torn.torn and same(run(parts, torn.steps, 12), whole)


def test_resuming_is_refused(tmp_path, rng):
    path, model = tmp_path / "run", zoo()
    base = copy.deepcopy(model)
    optimizer = LOZO(model)
    journal = Journal.create(path, optimizer)
    optimizer.step(zoo_loss(model))
    other = LOZO(base)
    before = path.read_bytes(), weights(base)
    with pytest.raises(JournalError, match="in use by another process"):
        Journal.resume(path, other)
    journal.close()
    with pytest.raises(JournalError, match="starts at step 0, and this optimiser has taken 1 steps"):
        Journal.resume(path, optimizer)
    with pytest.raises(ValueError, match="has 1 steps, not 2"):
        Journal.resume(path, other, upto=2)
    with pytest.raises(JournalError, match=r"cannot open the journal .*: No such file"):
        Journal.resume(tmp_path / "none", other)
    assert (path.read_bytes(), True) == (before[0], same(weights(base), before[1])) and other.journal is None
    assert Journal.resume(path, other) == 1 and other.journal is not None
    for made in (optimizer, other):
        made.handle.restore()
