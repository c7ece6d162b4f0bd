"""The real 260K-parameter Llama on SST-2 sentences, which several scripts of this folder adapt: language modelling, 48 tokens each.

The data folder is named by LOZO_KERNELS_DATA, or is shared/data beside the repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from bench.evidence import CPU
from lozo_kernels.hf.data.text import read_examples
from lozo_kernels.hf.loop.scoring import evaluate
from lozo_kernels.hf.objectives import LanguageModelObjective
from lozo_kernels.hf.run import draw_batches
from lozo_kernels.hf.tasks import TASKS
from python_tests import hf_helpers

LENGTH = 48


class Sentences:
    """Encoded sentences and the model.

    Args:
        folder: where the model is written as transformers has it.
        eval_size: how many dev sentences are used.
    """

    def __init__(self, folder: Path, eval_size: int) -> None:
        data, task = hf_helpers.data_folder(), TASKS["sst2"]
        hf_helpers.convert_stories260k(data, folder)
        self.folder = folder
        self.objective = LanguageModelObjective(transformers.AutoTokenizer.from_pretrained(folder), task, LENGTH)
        train, dev = (read_examples(data / f"sst2.{part}.jsonl", task, labelled=False) for part in ("train", "dev"))
        self.train, self.dev = self.objective.encode_all(train), self.objective.encode_all(dev[:eval_size])

    def model(self, dtype: str) -> torch.nn.Module:
        """The model with the checkpoint's weights, in evaluation mode."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=getattr(torch, dtype)).eval()

    def batches(self, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches without end, the same ones for the same seed."""
        batches = draw_batches(self.train, size, seed)
        while True:
            yield self.objective.collate(next(batches), CPU)

    def dev_loss(self, model: torch.nn.Module) -> float:
        """Mean loss of a token of the dev sentences, of the model as it behaves now."""
        return evaluate(model, self.objective, self.dev, 0, 64, CPU).loss
