"""LOZO on a base of 8-bit integers: what the factors of quantised layers learn, and that an adapter exports it.

``python -m bench.quantised`` writes ``bench/results/quantised.json``: the 260K-parameter Llama of the data folder, its linear
layers int8 (torchao, weight only), adapts to SST-2 sentences with the settings of the fp32 run in ``bench/real_input.py``, as a
probe. What it learned is exported as a LoRA adapter, whole and truncated, and evaluated on a fresh int8 base through PEFT.
"""

import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from bench.evidence import made_by, result_parser, write_result
from bench.sentences import LENGTH, Sentences
from lozo_kernels import LOZO, export_lora
from lozo_kernels.bench.environment import OtherLoad

LOZO_SETTINGS = {"lr": 1e-4, "eps": 1e-3, "rank": 2, "interval": 50, "seed": 0}
RANKS = (None, 8, 2)
BATCH = 16


def is_block_layer(module: torch.nn.Module, name: str) -> bool:
    """Whether a layer is quantised. The head is not, because it is tied to the embedding."""
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def quantised(sentences: Sentences) -> torch.nn.Module:
    """Makes the model with linear layers of 8-bit integers."""
    model = sentences.model("float32")
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_block_layer)
    return model


def adapt(sentences: Sentences, model: torch.nn.Module, steps: int) -> tuple[LOZO, float]:
    """Trains; returns the optimiser and the seconds that it took."""
    optimizer = LOZO(model, placement="probe", keep_factors=True, **LOZO_SETTINGS)
    batches = sentences.batches(BATCH, LOZO_SETTINGS["seed"])
    start = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        optimizer.step(lambda batch=batch: sentences.objective.loss(model, batch))
    return optimizer, time.perf_counter() - start


def adapter_row(sentences: Sentences, optimizer: LOZO, folder: Path, rank: int | None) -> dict:
    """Exports an adapter of a rank and evaluates it on a fresh base."""
    adapter = export_lora(optimizer.handle, folder, rank=rank)
    with warnings.catch_warnings():  # about merging, and about the tied head
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(quantised(sentences), folder).eval()
    errors = adapter.errors.values()
    size = sum(x.numel() * x.element_size() for x in adapter.tensors.values())
    return {
        "rank": adapter.rank,
        "exact": rank is None,
        "bytes": size,
        "dev_loss": sentences.dev_loss(model),
        "largest_error": max(errors),
    }


def measure(steps: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sentences = Sentences(folder / "stories260K", 872)
        model = quantised(sentences)
        integers = {n: m.weight.qdata.clone() for n, m in model.named_modules() if hasattr(getattr(m, "weight", None), "qdata")}
        before = sentences.dev_loss(model)
        optimizer, seconds = adapt(sentences, model, steps)
        after = sentences.dev_loss(model)
        modules = dict(model.named_modules())
        return {
            "model": "stories260K",
            "quantisation": "torchao Int8WeightOnlyConfig, linear layers but the head",
            "quantised_layers": len(integers),
            "quantised_parameters": sum(x.numel() for x in integers.values()),
            "integers_unchanged": all(torch.equal(modules[n].weight.qdata, x) for n, x in integers.items()),
            "settings": LOZO_SETTINGS | {"placement": "probe", "steps": steps, "batch_size": BATCH, "max_length": LENGTH},
            "dev_examples": len(sentences.dev),
            "loss_before": before,
            "loss_after": after,
            "train_seconds": round(seconds, 1),
            "sides": sorted({str(p.side) for p in optimizer.handle.report().parameters}),
            "adapters": [adapter_row(sentences, optimizer, folder / "adapter", rank) for rank in RANKS],
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
