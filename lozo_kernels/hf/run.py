"""What a run of ``finetune`` stands on: settings, data, checkpoint and objective, opened and checked before weights are read."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch

from ..bench.document import progress
from ..errors import InputError, require
from ..kernels.registry import choose_backend
from .data.examples import TaskData
from .data.load import load_data
from .loop.journaling import JOURNAL
from .loop.train import BatchSampler
from .models.checkpoint import Checkpoint, open_checkpoint, pick_device
from .objectives import OBJECTIVES, Encoded, Objective, choose_objective
from .output import make_folder
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run stands on.

    Attributes:
        settings: resolved.
        train_set, dev_set: the examples as the model takes them; of the dev examples as many as are evaluated.
        output: folder of the results, which is there.
        quiet: show no progress.
    """

    settings: Settings
    device: torch.device
    data: TaskData
    checkpoint: Checkpoint
    objective: Objective
    train_set: list[Encoded]
    dev_set: list[Encoded]
    output: Path
    quiet: bool = False

    def say(self, message: str) -> None:
        """Shows a line of progress."""
        if not self.quiet:
            progress(message)

    def batches(self) -> BatchSampler:
        """The batches of the run from its beginning."""
        return BatchSampler(self.train_set, self.settings.batch_size, self.settings.seed)


def open_run(settings: Settings, *, quiet: bool) -> Run:
    """Opens everything that can be wrong before weights are read, and makes the output folder.

    Raises:
        InputError: something is wrong.
    """
    device = pick_device(settings.device)
    try:
        choose_backend(device, settings.backend)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--backend: {e}") from None
    data = load_data(settings)
    for package in ("tqdm", "matplotlib", "tokenizers", "transformers"):
        require(package)
    checkpoint = open_checkpoint(settings)
    name = choose_objective(settings.objective, data.task, checkpoint.causal, checkpoint.masked)
    objective = OBJECTIVES[name](checkpoint.tokenizer, data.task, checkpoint.max_length(settings.max_length))
    train_set = objective.encode_all(data.train)
    dev = list(data.dev)
    random.Random(0).shuffle(dev)  # not by the run's seed: every run is evaluated on the same examples
    dev_set = objective.encode_all(dev[: settings.eval_size], evaluation=True)
    output = _make_output(Path(str(settings.output)))
    return Run(settings, device, data, checkpoint, objective, train_set, dev_set, output, quiet)


def _make_output(output: Path) -> Path:
    make_folder(output)
    for name in ("metrics.jsonl", JOURNAL, "summary.json", "loss.png", "model"):
        if (output / name).exists() and (output / name).is_dir() != (name == "model"):
            kind = "a folder" if name == "model" else "a file"
            raise InputError(f"--output {output}: {name} is in the way, where {kind} of that name is to be written")
    try:
        (output / "metrics.jsonl").touch()
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    return output
