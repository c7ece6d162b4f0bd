"""One run of 500 steps, taken in every way that there is to take it. This file is also what the processes run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from machine import stretched
from trainer_helpers import OPTIONS, VOCABULARY, Recorder, apart, arguments, token_rows, trained, zo_arguments
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from lozo_kernels import LOZO
from lozo_kernels.hf import ZOTrainer, attach

RANKS, STEPS, LR = 2, 500, 3e-4
DATA = token_rows(96)
for row in DATA:
    row["labels"][0] = -100  # nothing comes before it; the Trainer counts it for models that are not transformers' own


class Bigrams(nn.Module):
    """The smallest model that has what matters here: matrices, a vector, and the loss of transformers, a mean over labels."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        nn.init.normal_(self.embedding.weight, std=0.3)  # 500 steps in place round weights of 3 by 1e-5

    def forward(self, input_ids, labels, **more):
        logits = self.head(self.embedding(input_ids).tanh())
        return {"loss": ForCausalLMLoss(logits, labels, VOCABULARY, **more), "logits": logits}


def fresh():
    torch.manual_seed(1)
    return Bigrams()


def train(way, folder, parts=1, ranks=1):
    """The model after 500 steps of 16 examples, and the batches that it saw."""
    model, recorder = fresh(), Recorder()
    settings = {
        "learning_rate": LR,
        "gradient_accumulation_steps": parts,
        "per_device_train_batch_size": 16 // parts // ranks,
        "max_steps": STEPS,
    }
    settings["logging_steps"] = STEPS
    given = {"train_dataset": DATA, "data_collator": recorder}
    if way == "stock":
        optimizer = LOZO(model, lr=LR, seed=3, drive="backward", **OPTIONS)
        trainer = Trainer(model, arguments(folder, **settings), optimizers=(optimizer, None), **given)
    elif way == "attach":
        trainer = Trainer(model, arguments(folder, **settings), **given)
        optimizer = attach(trainer, seed=3, **OPTIONS).optimizer
    else:
        trainer = ZOTrainer(model, zo_arguments(folder, **settings), **given)
    trainer.train()
    optimizer = trainer.zo_optimizer if way == "ZOTrainer" else optimizer
    assert optimizer.steps_done == STEPS
    optimizer.handle.restore()
    return model, recorder.batches


def loop(way, batches):
    """The same without a Trainer."""
    model = fresh().train()
    driven = {"drive": "backward"} if way == "backward" else {}
    optimizer = LOZO(model, lr=LR, seed=3, **driven, **OPTIONS)
    for step, batch in enumerate(batches[:STEPS]):
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        if way == "closure":
            optimizer.step(lambda batch=batch: model(**batch)["loss"])
        else:
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.handle.restore()
    return model


def main(folder):
    """A process that forks, so that importing, which takes longest, is done once for both."""
    torch.set_num_threads(1)
    child = os.fork()
    rank = int(child == 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.save(trained(train("stock", folder / "run", ranks=RANKS)[0]), folder / f"{rank}.pt")
    distributed.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    model, batches = train("stock", tmp_path_factory.mktemp("stock"))
    assert len(batches) >= STEPS and apart(model, fresh()) > 5e-4
    return model, batches


@pytest.mark.parametrize("way", ["closure", "backward"])
def test_loops(stock, way):
    expected, batches = stock
    assert apart(loop(way, batches), expected) < 1e-5


@pytest.mark.parametrize(("way", "parts"), [("stock", 2), ("attach", 1), ("ZOTrainer", 1)])
def test_trainers(stock, tmp_path, way, parts):
    """Two micro-batches of 8 are a batch of 16."""
    assert apart(train(way, tmp_path, parts)[0], stock[0]) < 1e-5


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="there is no gloo backend")
def test_two_processes(stock, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (tmp_path / "log").open("w") as log:
        # A session of its own: what is killed at the limit of time is the pair.
        pair = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = pair.wait(timeout=stretched(120))
        except BaseException:
            os.killpg(pair.pid, signal.SIGKILL)
            raise
    assert code == 0, (tmp_path / "log").read_text()[-4000:]
    expected = trained(stock[0])
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert max((found[name] - w).abs().max() for name, w in expected.items()) < 1e-5


if __name__ == "__main__":
    main(Path(sys.argv[1]))
