"""Two processes give the run of one, in a plain loop and in the Trainer. This file is also what the processes run."""

import sys
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import distributed, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from trainer_helpers import OPTIONS, arguments, tiny_llama, token_rows, trained, zo_arguments  # noqa: E402
from transformers import Trainer, default_data_collator  # noqa: E402

from lozo_kernels import LOZO  # noqa: E402
from lozo_kernels.hf import ZOTrainer, attach  # noqa: E402

RANKS, STEPS, LR = 2, 9, 1e-4
DATA = token_rows(48)
CASES = ["loop", "stock", "attach", "subclass", "objective", "batched", "resumed"]


def loop(rank, ranks):
    """Batches of 16 in two micro-batches, without the Trainer."""
    model = tiny_llama(seed=1 + rank).train()  # which DistributedDataParallel makes those of rank 0
    optimizer = LOZO(model, lr=LR, seed=3, momentum=0.9, directions=2, drive="backward", **OPTIONS)
    wrapped = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    for step in range(STEPS):
        rows = [DATA[(16 * step + i) % 48] for i in range(16)][rank::ranks]
        half = len(rows) // 2
        # Equal numbers of examples, so the mean over processes and micro-batches is that over examples.
        for part in (rows[:half], rows[half:]):
            (sum(wrapped(**default_data_collator([row])).loss for row in part) / len(rows)).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    info = optimizer.info
    optimizer.handle.restore()
    return model, info


def train(case, folder, ranks):
    model = tiny_llama()
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8 // ranks}
    if case == "stock":
        optimizer = LOZO(model, lr=LR, seed=3, drive="backward", **OPTIONS)
        trainer = Trainer(model, arguments(folder, **settings), train_dataset=DATA, optimizers=(optimizer, None))
    elif case == "attach":
        settings |= {"label_smoothing_factor": 0.1, "save_strategy": "steps", "save_steps": 5}
        trainer = Trainer(model, arguments(folder, **settings), train_dataset=DATA)
        optimizer = attach(trainer, seed=3, placement="probe", side="scratch", **OPTIONS).optimizer
    elif case == "objective":
        trainer = ZOTrainer(model, zo_arguments(folder, **settings), train_dataset=DATA, compute_objective=squared_logits)
    elif case in ("batched", "split"):
        probing = {"evaluation": case, "directions": 2, "placement": "probe", "side": "scratch"}
        trainer = ZOTrainer(model, zo_arguments(folder, **probing, **settings), train_dataset=DATA)
    else:
        if case.startswith("resumed"):
            settings |= {"save_strategy": "steps", "save_steps": 5}
        trainer = ZOTrainer(model, zo_arguments(folder, placement="probe", side="scratch", **settings), train_dataset=DATA)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if case == "resumed again" else None)
    optimizer = trainer.zo_optimizer if isinstance(trainer, ZOTrainer) else optimizer
    info = optimizer.info
    optimizer.handle.restore()
    return model, info


def squared_logits(model, inputs):
    return model(input_ids=inputs["input_ids"]).logits.square().mean() * 100


def run(case, folder, rank=0, ranks=1):
    """(weights, what the last step saw) of a case."""
    model, info = loop(rank, ranks) if case == "loop" else train(case, folder / case.split()[0], ranks)
    return trained(model), {"c": info.c, "loss": info.loss, "step": info.step}


def main(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {case: run(case, folder, rank, RANKS) for case in CASES}
    found["split"] = run("split", folder, rank, RANKS)
    distributed.barrier()
    found["resumed again"] = run("resumed again", folder, rank, RANKS)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return run_ranks(__file__, RANKS, tmp_path_factory.mktemp("ddp"), torchrun=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_run_of_one(processes, tmp_path, case):
    expected, info = run(case, tmp_path)
    start = trained(tiny_llama())
    assert max((p - start[name]).abs().max() for name, p in expected.items()) > 1e-4
    (first, first_info), (second, second_info) = (found[case] for found in processes)
    for name, p in expected.items():
        assert torch.equal(first[name], second[name]), name  # not a bit apart
        assert torch.allclose(first[name], p, rtol=0, atol=1e-5), name
    assert first_info["step"] == info["step"] == STEPS - 1 and torch.equal(first_info["c"], second_info["c"])
    assert torch.equal(first_info["loss"], second_info["loss"])  # that of the whole batch, on every process
    assert float(first_info["loss"]) == pytest.approx(float(info["loss"]), rel=1e-5)


def test_two_processes_split_their_own_batches(processes, tmp_path):
    """Parts are others than in one process, which has longer batches to cut, so that c is another estimate of the same loss."""
    (first, info), (second, second_info) = (found["split"] for found in processes)
    start, (alone, _) = trained(tiny_llama()), run("split", tmp_path)
    assert all(torch.equal(p, second[name]) for name, p in first.items()) and torch.equal(info["c"], second_info["c"])
    moved, expected = (sum(float((found[n] - p).square().sum()) for n, p in start.items()) for found in (first, alone))
    assert info["c"].shape == (2,) and 0.2 < moved / expected < 5
    assert float(info["loss"]) == pytest.approx(float(second_info["loss"])) and 3.5 < float(info["loss"]) < 4.5


def test_resumed_by_two_processes(processes):
    for found in processes:
        whole, again = found["resumed"][0], found["resumed again"][0]
        assert all(torch.equal(p, again[name]) for name, p in whole.items())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]))
