"""What runs of ``finetune`` have from the Trainer: schedules, epochs, accumulation, reports, callbacks, checkpoints."""

import os
import signal

import pytest
import torch
from finetune_helpers import meaning, metrics, model_of

from lozo_kernels.cli import command as cli
from lozo_kernels.errors import InputError
from lozo_kernels.hf import finetune as module
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GIVEN = {"steps": 6, "eval_every": 2, "eval_size": 8, "batch_size": 4, "compare_steps": 0, "threads": 1}


def run(folder, callbacks=(), **more):
    return finetune(Settings(**{**GIVEN, **more, "output": str(folder)}), quiet=True, callbacks=callbacks)


def steps_of(folder):
    return [line for line in metrics(folder) if line["kind"] == "step"]


def expected_rates(name, steps, warmup, **options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-4)
    schedule = transformers.get_scheduler(name, optimizer, warmup, steps, options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("name", "warmup", "options"),
    [
        ("constant_with_warmup", 2, None),
        ("linear", 0.5, None),
        ("cosine_with_restarts", 0, '{"num_cycles": 2}'),
        ("polynomial", 1, '{"power": 2.0, "lr_end": 1e-6}'),
        ("warmup_stable_decay", 2, '{"num_decay_steps": 2}'),
        ("cosine_with_min_lr", 0, '{"min_lr": 1e-6}'),
    ],
)
@pytest.mark.parametrize("method", ["lozo", "ft-sgd"])
def test_schedules_are_those_of_transformers(tmp_path, name, warmup, options, method):
    run(tmp_path, method=method, lr=1e-4, lr_schedule=name, warmup_steps=warmup, lr_scheduler_kwargs=options)
    count = 3 if warmup == 0.5 else warmup
    wanted = expected_rates(name, 6, count, **Settings(lr_scheduler_kwargs=options).schedule_options)
    assert [line["lr"] for line in steps_of(tmp_path)] == wanted


def test_a_warmup_before_a_constant_rate(tmp_path):
    run(tmp_path, lr=1e-4, warmup_steps=2)
    assert [line["lr"] for line in steps_of(tmp_path)] == [0.0, 5e-5, 1e-4, 1e-4, 1e-4, 1e-4]


def test_epochs_are_passes_over_the_train_examples(tmp_path):
    summary = run(tmp_path, steps=None, eval_every=None, num_train_epochs=0.5, num_train=20, gradient_accumulation_steps=2)
    assert summary["steps_done"] == summary["settings"]["steps"] == 2  # 10 examples, 8 a step
    assert summary["settings"]["num_train_epochs"] is None and summary["settings"]["eval_every"] == 1


@pytest.mark.parametrize("method", ["lozo", "grzo", "ft-sgd", "forward-grad", "batched", "agzo-split"])
def test_batches_of_a_step_are_one_larger_batch(tmp_path, method):
    """Their examples are the same, and all count alike."""
    split = method in ("grzo", "agzo-split")
    more = {"method": method, "directions": 2} if split else {"method": method}
    if method == "batched":
        more = {"placement": "probe", "evaluation": "batched"}
    run(tmp_path / "whole", batch_size=8, lr=1e-4, **more)
    run(tmp_path / "parts", batch_size=4, gradient_accumulation_steps=2, lr=1e-4, **more)
    for a, b in zip(steps_of(tmp_path / "whole"), steps_of(tmp_path / "parts"), strict=True):
        if not split:  # whose parts of a batch are others
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["c"] == pytest.approx(b["c"], rel=0.02, abs=0.02)
    assert len(steps_of(tmp_path / "parts")) == 6


def test_a_rate_that_finds_itself_measures_on_the_batches_of_a_step(tmp_path):
    from lozo_kernels.hf.demo import MODEL

    more = {"model": str(MODEL), "task": "go-again", "steps": 51, "eval_every": 51}
    summary = run(tmp_path / "run", batch_size=2, gradient_accumulation_steps=2, **more)
    assert summary["settings"]["lr"] is None and summary["learning_rate"] > 0 and summary["stopped"] is None


class Seen(transformers.TrainerCallback):
    def __init__(self):
        self.logs, self.evaluations, self.ended, self.epochs = [], [], 0, []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append((state.global_step, dict(logs)))

    def on_evaluate(self, args, state, control, metrics=None, **_):
        self.evaluations.append(metrics["eval_loss"])

    def on_step_end(self, args, state, control, **_):
        self.epochs.append(state.epoch)

    def on_train_end(self, *_, **__):
        self.ended += 1


def test_callbacks_see_steps_and_evaluations(tmp_path):
    seen = Seen()
    summary = run(tmp_path, [seen], logging_steps=2, num_train=12)
    lines = steps_of(tmp_path)
    assert seen.evaluations == [e["loss"] for e in summary["evaluations"]] and len(seen.evaluations) == 4
    losses = {step: logs for step, logs in seen.logs if "loss" in logs}
    assert list(losses) == [2, 4, 6] and seen.ended == 1
    for step, logs in losses.items():
        assert logs["loss"] == pytest.approx(sum(line["loss"] for line in lines[step - 2 : step]) / 2)
        assert logs["learning_rate"] == lines[step - 1]["lr"] and logs["projected_gradient"] == lines[step - 1]["c"][0]
        assert logs["step_ms"] >= logs["forwards_ms"] > 0
    assert seen.epochs == [pytest.approx((i + 1) / 3) for i in range(6)]


def test_a_report_by_its_name(tmp_path, monkeypatch):
    made = []

    class Tracker(Seen):
        def __init__(self):
            super().__init__()
            made.append(self)

    table = transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK
    monkeypatch.setitem(table, "mine", Tracker)
    run(tmp_path, report_to="mine", logging_steps=3)
    assert [step for step, logs in made[-1].logs if "loss" in logs] == [3, 6]


def test_a_callback_can_end_a_run_which_then_goes_on(tmp_path):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 3

    summary = run(tmp_path / "run", [Stop()])
    assert summary["steps_done"] == 3 and summary["stopped"] == "a callback ended the training"
    run(tmp_path / "whole")
    assert cli.main(["finetune", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole") and meaning(tmp_path / "run") == meaning(tmp_path / "whole")


def test_checkpoints_are_models_by_themselves(tmp_path):
    run(tmp_path / "run", save_steps=2, save_total_limit=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    kept = str(tmp_path / "run" / "checkpoint-4")
    assert (tmp_path / "run" / "checkpoint-4" / "tokenizer.json").is_file()
    assert cli.main(["verify", "--journal", str(tmp_path / "run"), "--checkpoint", kept, "--step", "4"]) == 0
    with pytest.raises(InputError, match="is in it, and would be replaced"):
        finetune(Settings(model=kept, task="go-again", output=str(tmp_path / "run")), overwrite=True)
    finetune(Settings(**GIVEN, output=str(tmp_path / "run")), quiet=True, overwrite=True)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that are forked")
@pytest.mark.parametrize("step", [3, 4])
def test_killed_between_checkpoints(tmp_path, step):
    """With a schedule, accumulation and half precision, where a checkpoint rounds the weights."""
    more = {
        "save_steps": 2, "lr_schedule": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 2}', "warmup_steps": 1,
        "gradient_accumulation_steps": 2, "dtype": "bf16", "lr": 1e-3, "eval_every": 3,
    }  # fmt: skip
    run(tmp_path / "whole", **more)

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            run(tmp_path / "run", [Kill()], **more)
        finally:
            os._exit(9)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert cli.main(["finetune", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert model_of(tmp_path / "run") == model_of(tmp_path / "whole") and meaning(tmp_path / "run") == meaning(tmp_path / "whole")
    assert cli.main(["verify", "--journal", str(tmp_path / "run"), "--checkpoint", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"report_to": "mine"}, "--report-to mine: mine is not supported"),
        ({"lr_schedule": "warmup_stable_decay"}, "--lr-schedule warmup_stable_decay: .*num_decay_steps.*; --lr-scheduler-kwargs"),
        ({"lr_schedule": "linear", "lr_scheduler_kwargs": '{"power": 1}'}, "--lr-schedule linear: .*power"),
        ({"lr_scheduler_kwargs": "[1]"}, r"--lr-scheduler-kwargs is a JSON object, not '\[1\]'"),
        ({"lr_scheduler_kwargs": "{"}, "--lr-scheduler-kwargs is a JSON object: "),
        ({"num_train_epochs": 1.0}, "give --steps or --num-train-epochs"),
        ({"save_total_limit": 1}, "goes with --save-steps"),
        ({"method": "zero-shot", "warmup_steps": 2, "steps": None, "eval_every": None, "compare_steps": None}, "means nothing to"),
        ({"gradient_accumulation_steps": 2, "compare_steps": 4}, "the published code has no --gradient-accumulation-steps"),
    ],
)
def test_what_cannot_be_had_is_said_before_weights_are_read(tmp_path, monkeypatch, more, words):
    monkeypatch.setattr(module, "load_model", None)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()
