"""Runs in an engine are those of a probe of the Hugging Face model, and their journals give the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lozo_kernels
from lozo_kernels.errors import EngineError
from lozo_kernels.journal import Journal, read_journal, replay
from lozo_kernels.vllm import LOZO, nll

from .engines import EPS, OPTIONS, engine, loss_of, many, reference, texts

ROUNDING = 2e-7
"""Of a loss near 6 in fp32, which sums over layers give a few units in the last place: c has it over eps."""


def compare(path, llm, steps, folder, *, max_windows=32, batch=texts, **settings):
    """Takes steps in both, of batch(step); returns the worst difference of c, and of the weights that the journal gives."""
    model = reference(path)
    journal = folder / "run.journal"
    journal.unlink(missing_ok=True)
    mine = LOZO(llm, lr=2e-4, eps=EPS, journal=journal, max_windows=max_windows, **settings)
    theirs = lozo_kernels.LOZO(model, lr=2e-4, eps=EPS, placement="probe", **OPTIONS, **settings)
    worst = 0.0
    for i in range(steps):
        some = batch(i)
        mine.step(nll(some))
        theirs.step(lambda some=some: loss_of(model, some))
        worst = max(worst, float((mine.info.c - theirs.info.c).abs().max()))
    weights = dict(mine.weights())
    model.state_dict()  # merges
    difference = max(float((weights[name] - p.detach()).abs().max()) for name, p in model.named_parameters())
    mine._recorded.close()
    return worst, difference, mine, model


def bound(settings):
    return 8 * ROUNDING / EPS if settings.get("two_sided", True) else 16 * ROUNDING / EPS


def test_sixty_steps_are_those_of_hugging_face(models, tmp_path):
    """Three windows; ``lozo-kernels replay`` gives the weights, and the engine's loss is that of them."""
    path = models("llama")
    with engine(path) as llm:
        worst, difference, mine, model = compare(path, llm, 60, tmp_path, batch=many)
        assert worst < 1e-5, worst
        assert difference < 1e-6, difference
        some, last = texts(99), 60
        mine.handle.expect(last, [(0, 0.0)])
        total, count = mine.handle.loss_at(nll(some))
        assert abs(total / count - loss_of(model, some)) < 1e-6
        mine.remove()
    files = ["--model", path, "--journal", str(tmp_path / "run.journal"), "--output", str(tmp_path / "tuned")]
    command = [sys.executable, "-m", "lozo_kernels", "replay", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tuned = reference(str(tmp_path / "tuned" / "model"))
    assert max(float((p - q).abs().max()) for p, q in zip(tuned.parameters(), model.parameters(), strict=True)) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 20.0},
        {"directions": 7, "two_sided": False},
        {"directions": 4, "normalise": "spread"},
    ],
    ids=str,
)
def test_other_rules(models, tmp_path, settings):
    path = models("qwen2")
    with engine(path, ours={"points": 5}) as llm:  # so that some steps need several batches
        worst, difference, mine, _ = compare(path, llm, 30, tmp_path, **settings)
        assert worst < bound(settings), worst
        assert difference < 1e-6, difference
        mine.remove()


def test_a_rate_that_finds_itself(models, tmp_path):
    path = models("llama")
    model = reference(path)
    with engine(path) as llm:
        mine = LOZO(llm, lr="auto", eps=EPS)
        theirs = lozo_kernels.LOZO(model, lr="auto", eps=EPS, placement="probe", **OPTIONS)
        for i in range(14):
            some = texts(i)
            halves = [some[:2], some[2:]] if theirs.measures_next else [some]
            mine.step(nll(some))
            theirs.step([lambda half=half: loss_of(model, half) for half in halves])
        ours, other = mine.learning_rates[0], theirs.learning_rates[0]
        assert other > 0
        assert abs(ours - other) < 0.02 * other, (ours, other)  # curvature is a difference over eps^2
        with pytest.raises(ValueError, match="two texts"):
            while True:
                mine.step(nll(texts(0)[:1]))


def test_a_reload_changes_nothing_but_rounding(models, tmp_path):
    """After two windows the engine loads its own tuned weights, and the run goes on."""
    path = models("llama")
    with engine(path, ours={"interval": 5}) as llm:
        model = reference(path)
        mine = LOZO(llm, lr=2e-4, eps=EPS, momentum=0.9, journal=tmp_path / "run.journal", max_windows=2)
        theirs = lozo_kernels.LOZO(model, lr=2e-4, eps=EPS, momentum=0.9, placement="probe", **OPTIONS | {"interval": 5})
        reloads, windows = 0, 0
        for i in range(22):
            some = many(i)
            mine.step(nll(some))
            theirs.step(lambda some=some: loss_of(model, some))
            assert float((mine.info.c - theirs.info.c).abs().max()) < 1e-5
            reloads += mine.handle.windows < windows
            windows = mine.handle.windows
        assert reloads >= 1
        mine._recorded.close()
        with pytest.raises(EngineError, match="earlier run"):
            LOZO(llm, lr=1e-4)


def test_a_run_goes_on_in_hugging_face_and_back(models, tmp_path):
    path, journal = models("llama"), tmp_path / "run.journal"

    def steps(optimizer, first, count, loss):
        for i in range(first, first + count):
            optimizer.step(loss(many(i)))
        return optimizer.info.c

    whole = reference(path)
    other = lozo_kernels.LOZO(whole, lr=2e-4, eps=EPS, placement="probe", **OPTIONS)
    wanted = steps(other, 0, 66, lambda some: lambda: loss_of(whole, some))
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=2e-4, eps=EPS, journal=journal)
        steps(optimizer, 0, 22, nll)
        optimizer._recorded.close()
    model = reference(path)
    there = lozo_kernels.LOZO(model, lr=2e-4, eps=EPS, placement="probe", **OPTIONS)
    assert Journal.resume(journal, there) == 22
    steps(there, 22, 22, lambda some: lambda: loss_of(model, some))
    there.journal.close()
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=2e-4, eps=EPS, journal=journal, resume=True)
        assert optimizer.steps_done == 44
        found = steps(optimizer, 44, 22, nll)
        assert float((found - wanted).abs().max()) < 1e-5
        optimizer._recorded.close()
    assert read_journal(journal).steps == 66
    tuned = reference(path)
    replay(tuned, journal)
    whole.state_dict()
    assert max(float((p - q).abs().max()) for p, q in zip(tuned.parameters(), whole.parameters(), strict=True)) < 1e-6


def test_a_journal_of_other_weights_is_refused(models, tmp_path):
    journal = tmp_path / "run.journal"
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=2e-4, eps=EPS, journal=journal)
        optimizer.step(nll(texts(0)))
        optimizer._recorded.close()
    other = reference(models("llama"))
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1.0
    other.save_pretrained(tmp_path / "other")
    with engine(str(tmp_path / "other")) as llm, pytest.raises(lozo_kernels.journal.JournalError, match="other weights"):
        LOZO(llm, lr=2e-4, eps=EPS, journal=journal, resume=True)
    assert Path(journal).exists()


@pytest.mark.parametrize(("name", "include"), [("llama", "*_proj*"), ("gpt2", "*.c_*.weight")])
def test_an_adapter_gives_the_losses_of_the_run(models, tmp_path, name, include):
    """Of layers whose weights are stored transposed too (GPT-2)."""
    peft = pytest.importorskip("peft")
    path, some = models(name), texts(5)
    with engine(path, ours={"include": [include], "interval": 4}) as llm:
        optimizer = LOZO(llm, lr=1e-3, eps=EPS, journal=tmp_path / "run.journal")
        for i in range(10):
            optimizer.step(nll(texts(i)))
        optimizer.export_lora(tmp_path / "adapter")
        optimizer.save(tmp_path / "tuned")
        optimizer.handle.expect(10, [(0, 0.0)])
        total, count = optimizer.handle.loss_at(nll(some))
        optimizer._recorded.close()
    base = loss_of(reference(path), some)
    adapted = peft.PeftModel.from_pretrained(reference(path), str(tmp_path / "adapter"))
    for loss in (loss_of(adapted, some), loss_of(reference(str(tmp_path / "tuned")), some)):
        assert abs(loss - total / count) < 2e-6
        assert abs(loss - base) > 1e-4
