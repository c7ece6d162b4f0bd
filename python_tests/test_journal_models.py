"""Journals of models whose weights are elsewhere: offloaded, quantised, in the hands of the Trainer."""

import copy

import pytest
import torch

from lozo_kernels import LOZO
from lozo_kernels.journal import Journal, JournalError, read_journal, replay
from python_tests.models import same, weights

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def test_offloaded_weights(rng, tmp_path):
    """The journal of a model on disk and CPU replays on one in memory, and goes on on another one offloaded."""
    from python_tests.test_probe_offload import closure, make, offload

    def run(path, steps):
        model = offload(make("llama"), "cpu", tmp_path)
        optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, placement="probe", side="scratch")
        first = Journal.resume(path, optimizer) if path.exists() else 0
        if not first:
            Journal.create(path, optimizer)
        for _ in range(first, steps):
            optimizer.step(closure(model))
        optimizer.journal.close()
        optimizer.handle.restore()

    run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 4)
    run(tmp_path / "parts", 7)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    model = make("llama")
    assert replay(model, tmp_path / "whole").steps == 7


def test_quantised_layers(rng, tmp_path):
    """No weight can hold what they learned: the factors are rebuilt."""
    from python_tests.test_probe_offload import closure, llama
    from python_tests.test_probe_quantised import quantise, torchao_int8

    torch.manual_seed(5)
    base = quantise(llama(), torchao_int8)

    def run(path, steps):
        model = copy.deepcopy(base)
        optimizer = LOZO(model, lr=1e-2, eps=1e-2, interval=3, placement="probe")
        first = Journal.resume(path, optimizer) if path.exists() else 0
        if not first:
            Journal.create(path, optimizer)
        for _ in range(first, steps):
            optimizer.step(closure(model))
        optimizer.journal.finish()
        past = optimizer.handle.past
        optimizer.handle.restore(discard=True)
        return past

    whole = run(tmp_path / "whole", 7)
    run(tmp_path / "parts", 4)
    parts = run(tmp_path / "parts", 7)
    assert whole and whole.keys() == parts.keys()
    assert all(torch.equal(whole[name][key], parts[name][key]) for name in whole for key in ("b", "v"))
    assert read_journal(tmp_path / "whole").fingerprint == read_journal(tmp_path / "parts").fingerprint
    with pytest.raises(JournalError, match="is quantised: no weight can hold what it learned"):
        replay(base, tmp_path / "whole")


@pytest.mark.parametrize("options", [{}, {"placement": "probe", "momentum": 0.9}])
def test_the_stock_trainer(rng, tmp_path, options):
    """Its groups decay or do not, its rate changes, and its checkpoints merge."""
    from transformers import Trainer, TrainingArguments

    from python_tests.trainer_helpers import LENGTH, VOCABULARY, tiny_llama

    model = tiny_llama()
    base = copy.deepcopy(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (12, LENGTH)).tolist()]
    optimizer = LOZO(model, lr=1e-3, eps=1e-2, interval=4, drive="backward", weight_decay=0.1, **options)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100,
    )  # fmt: skip
    with Journal.create(tmp_path / "run", optimizer):
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    optimizer.handle.restore()
    run = read_journal(tmp_path / "run")
    assert run.steps == 6 and len({r.lr for r in run.records if hasattr(r, "lr")}) > 1
    assert replay(base, run).agrees is True
    assert same(weights(base), weights(model))
