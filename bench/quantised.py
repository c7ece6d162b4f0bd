"""LOZO on a base of 8-bit integers: what the factors of quantised layers learn, and that an adapter takes it with it.

``python -m bench.quantised`` writes ``bench/results/quantised.json``: the 260K-parameter Llama of the data folder, its linear
layers int8 (torchao, weight only), adapts to SST-2 sentences with the settings of the fp32 run in ``bench/real_input.py``, as a
probe. What it learned is exported as a LoRA adapter, whole and truncated, and evaluated on a fresh int8 base through PEFT.
"""

import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from bench.evidence import CPU, made_by, result_parser, write_result
from lozo_kernels import LOZO, export_lora
from lozo_kernels.bench.environment import OtherLoad
from lozo_kernels.hf.data.load import load_data
from lozo_kernels.hf.loop.train import BatchSampler, eval_batch_size, evaluate
from lozo_kernels.hf.models.load import load_model, open_checkpoint
from lozo_kernels.hf.objectives import OBJECTIVES
from lozo_kernels.hf.settings import Settings
from python_tests import hf_helpers

LOZO_SETTINGS = {"lr": 1e-4, "eps": 1e-3, "rank": 2, "interval": 50, "seed": 0}
RANKS = (None, 8, 2)


def settings(folder: Path, steps: int) -> Settings:
    given = {"batch_size": 16, "max_length": 48, "eval_size": 872, "threads": 1, "steps": steps}
    where = {"model": str(folder / "stories260K"), "data_dir": str(hf_helpers.data_folder()), "output": str(folder / "output")}
    return Settings(task="sst2", objective="lm", method="lozo", **given, **where).resolved()


def is_block_layer(module: torch.nn.Module, name: str) -> bool:
    """The head stays: it is tied to the embedding."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


class Task:
    """The data of the run, and its models."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.settings = settings(folder, steps)
        self.data = load_data(self.settings)
        self.checkpoint = open_checkpoint(self.settings)
        length = self.checkpoint.max_length(self.settings.max_length)
        self.objective = OBJECTIVES["lm"](self.checkpoint.tokenizer, self.data.task, length)
        self.train = self.objective.encode_all(self.data.train)
        self.dev = self.objective.encode_all(self.data.dev)[: self.settings.eval_size]

    def model(self) -> torch.nn.Module:
        model, _ = load_model(self.checkpoint, "lm", self.data.task, self.settings, CPU)
        quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_block_layer)
        return model

    def dev_loss(self, model: torch.nn.Module) -> float:
        return evaluate(model, self.objective, self.dev, 0, eval_batch_size(self.settings), CPU).loss


def adapt(task: Task, model: torch.nn.Module, steps: int) -> tuple[LOZO, float]:
    """Trains, and returns how long that took."""
    optimizer = LOZO(model, placement="probe", keep_factors=True, **LOZO_SETTINGS)
    sampler = BatchSampler(task.train, task.settings.batch_size, LOZO_SETTINGS["seed"])
    start = time.perf_counter()
    for _ in range(steps):
        batch = task.objective.collate(sampler.next(), CPU)
        optimizer.step(lambda batch=batch: task.objective.loss(model, batch))
    return optimizer, time.perf_counter() - start


def adapter_row(task: Task, optimizer: LOZO, folder: Path, rank: int | None) -> dict:
    """The adapter of a rank on a fresh base."""
    adapter = export_lora(optimizer.handle, folder, rank=rank)
    with warnings.catch_warnings():  # about merging, and about the tied head
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(task.model(), folder).eval()
    errors = adapter.errors.values()
    size = sum(x.numel() * x.element_size() for x in adapter.tensors.values())
    return {
        "rank": adapter.rank,
        "exact": rank is None,
        "bytes": size,
        "dev_loss": task.dev_loss(model),
        "largest_error": max(errors),
    }


def measure(steps: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hf_helpers.convert_stories260k(hf_helpers.data_folder(), folder / "stories260K")
        task = Task(folder, steps)
        model = task.model()
        integers = {n: m.weight.qdata.clone() for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "qdata")}
        before = task.dev_loss(model)
        optimizer, seconds = adapt(task, model, steps)
        after = task.dev_loss(model)
        modules = dict(model.named_modules())
        return {
            "model": "stories260K",
            "quantisation": "torchao Int8WeightOnlyConfig, linear layers but the head",
            "quantised_layers": len(integers),
            "quantised_parameters": sum(x.numel() for x in integers.values()),
            "integers_unchanged": all(torch.equal(modules[n].weight.qdata, x) for n, x in integers.items()),
            "settings": LOZO_SETTINGS | {"placement": "probe", "steps": steps, "batch_size": 16, "max_length": 48},
            "dev_examples": len(task.dev),
            "loss_before": before,
            "loss_after": after,
            "train_seconds": round(seconds, 1),
            "sides": sorted({str(p.side) for p in optimizer.handle.report().parameters}),
            "adapters": [adapter_row(task, optimizer, folder / "adapter", rank) for rank in RANKS],
        }


def main() -> int:
    parser = result_parser(__doc__, "quantised.json")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    others = OtherLoad()
    result = made_by("bench.quantised", sys.argv[1:])
    result["versions"] |= {"torchao": torchao.__version__, "peft": peft.__version__}
    result |= measure(args.steps)
    result["cpus_used_by_others"] = others.mean()
    print(f"dev loss {result['loss_before']:.3f} -> {result['loss_after']:.3f} in {args.steps} steps, {result['train_seconds']} s")
    for row in result["adapters"]:
        print(f"  adapter of rank {row['rank']}: dev loss {row['dev_loss']:.3f}, {row['largest_error']:.1%} left out at most")
    write_result(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
