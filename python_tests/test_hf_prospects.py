"""What is said early to a run that learns next to nothing, and to one whose loss rises."""

import random
import warnings

import pytest

from lozo_kernels.hf.loop.records import StepRecord
from lozo_kernels.hf.trainer.prospects import LOOKED_AT, WINDOW, Prospects, Rising


def record(step, loss, c=1.0, lr=1e-3, *, skipped=False):
    return StepRecord(step, loss, [c], lr, 1.0, 1.0, skipped)


def said(judge, records):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in records:
            if not one.skipped:
                judge.look(one.step, one.loss, one.c, one.lr)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(("lr", "messages"), [(1e-9, 1), (1e-4, 0)])
def test_a_rate_that_can_change_nothing_is_named_once(lr, messages):
    found = said(Prospects(0.5, 1000, ""), [record(i, 2.0, c=0.7, lr=lr) for i in range(3 * LOOKED_AT)])
    assert len(found) == messages and all("next to nothing" in one for one in found)


def test_without_a_scale_nothing_is_said():
    assert not said(Prospects(None, 1000, ""), [record(i, 2.0, lr=1e-12) for i in range(3 * LOOKED_AT)])


@pytest.mark.parametrize(("slope", "messages"), [(0.002, 1), (0.0, 0), (-0.002, 0)])
def test_a_loss_that_rises_for_long_is_said_once(rng, slope, messages):
    noise = random.Random(rng.random())
    losses = [2.0 + slope * i + noise.gauss(0.0, 0.05) for i in range(20 * WINDOW)]
    found = said(Rising("--lr"), [record(i, loss) for i, loss in enumerate(losses)])
    assert len(found) == messages and all("the loss rises" in one and "lower --lr" in one for one in found)


def test_a_rise_that_is_noise_or_soon_over_is_not_said(rng):
    noise = random.Random(rng.random())
    up_and_down = [
        2.0 + 0.002 * min(i, 2 * WINDOW) - 0.01 * max(0, i - 2 * WINDOW) + noise.gauss(0.0, 0.01) for i in range(6 * WINDOW)
    ]
    assert not said(Rising("--lr"), [record(i, loss) for i, loss in enumerate(up_and_down)])
    steps = [record(i, 2.0 + 0.001 * (i // WINDOW) + noise.gauss(0.0, 0.5)) for i in range(6 * WINDOW)]
    assert not said(Rising("--lr"), steps)


def trained_by(folder, **more):
    """What a Trainer warns of."""
    pytest.importorskip("accelerate")
    from lozo_kernels.hf import ZOTrainer
    from python_tests.trainer_helpers import tiny_llama, token_rows, zo_arguments

    settings, objective = {name: v for name, v in more.items() if name != "objective"}, more.get("objective")
    args = zo_arguments(folder, lr_scheduler_type="constant", per_device_train_batch_size=2, **settings)
    trainer = ZOTrainer(tiny_llama(), args, train_dataset=token_rows(8), compute_objective=objective)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "learning_rate" in str(w.message)]


@pytest.mark.parametrize(("lr", "messages"), [(1e-10, 1), (1e-3, 0)])
def test_a_trainer_says_that_nothing_will_be_learned(tmp_path, lr, messages):
    found = trained_by(tmp_path, learning_rate=lr, max_steps=2 * LOOKED_AT + 5)
    assert len(found) == messages
    assert all("all 45 steps together" in one and "Give a larger learning_rate" in one for one in found)


def test_a_trainer_says_that_the_loss_rises(tmp_path):
    calls = []

    def objective(*_):
        calls.append(1)
        return 1.0 + 0.01 * len(calls)

    found = trained_by(tmp_path, learning_rate=1e-6, max_steps=6 * WINDOW, objective=objective)
    assert len([one for one in found if "the loss rises" in one and "lower learning_rate than 1e-06" in one]) == 1


def test_a_rate_that_warms_up_is_judged_when_it_has():
    warm = [record(i, 2.0, c=0.7, lr=1e-4 * min(1.0, i / 200)) for i in range(260)]
    assert not said(Prospects(0.5, 1000, ""), warm)
    assert len(said(Prospects(0.5, 1000, ""), [record(i, 2.0, c=0.7, lr=1e-9 * min(1.0, i / 200)) for i in range(260)])) == 1


def test_each_run_of_a_trainer_is_judged(tmp_path):
    pytest.importorskip("accelerate")
    from lozo_kernels.hf import ZOTrainer
    from python_tests.trainer_helpers import tiny_llama, token_rows, zo_arguments

    args = zo_arguments(tmp_path, lr_scheduler_type="constant", learning_rate=1e-3, max_steps=25, per_device_train_batch_size=2)
    trainer = ZOTrainer(args=args, model_init=lambda: tiny_llama(), train_dataset=token_rows(8))
    trainer.train()
    trainer.restore()
    trainer.args.learning_rate = 1e-12
    with pytest.warns(UserWarning, match="next to nothing"):
        trainer.train()
