"""A journal of a run of the Trainer, and going on from a checkpoint and the journal together."""

import pytest

for package in ("transformers", "accelerate"):
    pytest.importorskip(package)

from models import same  # noqa: E402
from trainer_helpers import tiny_llama, token_rows, trained, zo_arguments  # noqa: E402

from lozo_kernels.hf import ZOTrainer  # noqa: E402
from lozo_kernels.journal import Journal, read_journal, replay  # noqa: E402

STEPS, SAVED = 7, 3


@pytest.mark.parametrize("options", [{"placement": "probe", "side": "scratch"}, {"method": "lozo-m"}], ids=["probe", "in place"])
def test_a_checkpoint_and_the_journal_go_on_together(tmp_path, options):
    """Of a run that was killed after steps that no checkpoint has: they are cut off and taken again."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "per_device_train_batch_size": 3, "interval": 2}
    path = tmp_path / "run.journal"

    def trainer_of(model):
        arguments = zo_arguments(tmp_path / "run", **settings | options)
        trainer = ZOTrainer(model, arguments, train_dataset=token_rows(3 * STEPS))
        trainer.create_optimizer()
        return trainer

    def ended(trainer):
        trainer.zo_optimizer.journal.finish()
        trainer.restore()
        return trained(trainer.model)

    trainer = trainer_of(tiny_llama())
    Journal.create(path, trainer.zo_optimizer)
    trainer.train()
    end = ended(trainer)
    again = trainer_of(tiny_llama())
    assert Journal.resume(path, again.zo_optimizer, upto=SAVED) == SAVED
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{SAVED}"))
    assert same(ended(again), end)
    base = tiny_llama()
    assert replay(base, path).agrees is True and same(trained(base), end)
    assert read_journal(path).steps == STEPS
