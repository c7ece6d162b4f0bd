"""What a run stands on: settings, data, checkpoint and objective, opened and checked before weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import torch

from ..bench.document import progress
from ..errors import InputError, require
from ..kernels.registry import choose_backend
from ..optim.rate_finder import measures
from .data.examples import TaskData
from .data.load import load_data
from .data.splits import draw_demonstrations
from .loop.building import make_schedule
from .loop.processes import is_first, part
from .loop.records import EvalRecord
from .loop.scoring import evaluate
from .methods import METHODS
from .models.checkpoint import EMBEDDED, Checkpoint, open_checkpoint, pick_device
from .models.hub import check_login
from .models.pretrained import first_line
from .objectives import OBJECTIVES, Encoded, Objective, PromptedObjective, choose_objective
from .settings import Settings
from .tasks import Task

MEASURED_STEPS = 2
"""Steps whose memory is measured: some optimisers make their state at the end of the first."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run stands on.

    Attributes:
        settings: resolved.
        quiet: show no progress.
    """

    settings: Settings
    device: torch.device
    data: TaskData
    checkpoint: Checkpoint
    objective: Objective
    quiet: bool = False

    @property
    def model_name(self) -> str:
        """The model as a reader knows it."""
        return self.settings.model or EMBEDDED

    def describe(self) -> list[str]:
        """What is trained on what: the model first, the examples, and classes with their numbers."""
        found = f"{len(self.train_set)} train and {len(self.dev_set)} dev examples from {self.data.source}"
        lines = [f"model: {self.model_name}", f"{self.data.task.name} ({self.objective.name}): {found}"]
        counts = [f"{name} {count}" for name, count in self.data.counts().items()]
        if counts:
            lines.append(f"{len(counts)} classes: {', '.join(counts[:20])}{', ...' if len(counts) > 20 else ''}")
        return lines

    def notes(self) -> list[str]:
        """What is likely not meant so."""
        settings, lacking = self.settings, self.data.without_examples()
        notes = [f"no train example is of the class {', '.join(lacking[:5])}"] if lacking else []
        train = {e.texts for e in self.data.train}
        seen = sum(e.texts in train for e in self.data.dev)
        if seen:
            notes.append(f"{seen} of the {len(self.data.dev)} dev examples have the texts of train examples")
        long = sum(self._fills(e) for e in self.train_set)
        if long:
            most = self.objective.max_length
            notes.append(
                f"{long} of the {len(self.train_set)} train examples have {most} tokens or more, and no more than {most} of them "
                "are read (--max-length, or the context of the model)"
            )
        if settings.model is None and (settings.train_file or settings.data_dir):
            notes.append(f"no --model was given, so that this is of {EMBEDDED}, which is made for the demo and knows little")
        return notes

    @functools.cached_property
    def train_set(self) -> list[Encoded]:
        """The train examples as the model takes them."""
        return self.objective.encode_all(self.data.train)

    @functools.cached_property
    def dev_set(self) -> list[Encoded]:
        """The dev examples that are evaluated during training, as the model takes them."""
        dev = list(self.data.dev)
        random.Random(0).shuffle(dev)  # not by the run's seed: every run is evaluated on the same examples
        return self.objective.encode_all(dev[: self.settings.eval_size], evaluation=True)

    @property
    def eval_batch_size(self) -> int:
        """Rows of a batch that is only evaluated: more than in training, as neither its time nor its memory is compared."""
        return max(32, self.settings.batch_size)

    def evaluate(self, model: torch.nn.Module, step: int) -> EvalRecord:
        """Loss and accuracy on the dev examples after so many steps."""
        return evaluate(model, self.objective, self.dev_set, step, self.eval_batch_size, self.device)

    def batches(self) -> Iterator[list[Encoded]]:
        """The batches of the run from its beginning, without end: each pass over the data in a new order."""
        return draw_batches(self.train_set, self.settings.batch_size, self.settings.seed)

    def _fills(self, encoded: Encoded) -> bool:
        """Whether an example, or the longest of its options, takes all the tokens that fit."""
        rows = encoded.get("options", [encoded])
        return max(len(row.get("input_ids", ())) for row in rows) >= self.objective.max_length

    def measured_steps(self, start: int) -> list[int]:
        """The steps after so many whose memory is measured, two or fewer at the end. Those that measure for a learning rate, which
        evaluate a batch in parts, are not among them."""
        parts = measures if self.settings.lr is None else lambda _: False
        return list(itertools.islice(itertools.filterfalse(parts, range(start, self.settings.steps or 0)), MEASURED_STEPS))

    def batches_of(self, steps: Sequence[int]) -> list[Sequence[Encoded]]:
        """This process's part of the batches of some steps, which ascend; the first of each step."""
        firsts = itertools.islice(self.batches(), 0, None, self.settings.gradient_accumulation_steps)
        drawn = list(itertools.islice(firsts, max(steps, default=-1) + 1))
        return [part(drawn[step], self.settings.parallel) for step in steps]

    def say(self, message: str) -> None:
        if not self.quiet:
            progress(message)


def draw_batches(examples: Sequence[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches of so many examples without end; all examples come before any comes again."""
    count, generator = len(examples), torch.Generator().manual_seed(seed)
    orders = (torch.randperm(count, generator=generator, dtype=torch.int64, device="cpu").tolist() for _ in itertools.repeat(None))
    indices = itertools.chain.from_iterable(orders)
    while True:
        yield [examples[i] for i in itertools.islice(indices, size)]


def open_run(settings: Settings, *, quiet: bool, own: Task | None = None) -> Run:
    """Opens what resolved settings name, weights apart.

    Args:
        own: see :func:`~.data.load.load_data`.

    Raises:
        InputError: something cannot be had, does not go together, or is not installed.
    """
    device = pick_device(settings.device)
    try:
        choose_backend(device, settings.backend)
    except (ValueError, RuntimeError) as e:
        raise InputError(f"--backend: {e}") from None
    data = load_data(settings, own)
    for package in ("tokenizers", "transformers", *(("tqdm", "matplotlib") if METHODS[settings.method].trains else ())):
        require(package)
    checkpoint = open_checkpoint(settings)
    kind = OBJECTIVES[choose_objective(settings.objective, data.task, checkpoint.causal, checkpoint.masked)]
    demonstrations = []
    if settings.method == "icl":
        if not issubclass(kind, PromptedObjective):
            raise InputError(f"--method icl needs a causal model and a task with a prompt; the objective here is {kind.name}")
        demonstrations = draw_demonstrations(data.train, settings)
        if not demonstrations:
            raise InputError(f"--method icl: {data.source} has no train examples to show")
    objective = kind(checkpoint.tokenizer, data.task, checkpoint.max_length(settings.max_length), demonstrations)
    run = Run(settings, device, data, checkpoint, objective, quiet)
    if settings.num_train_epochs is not None:
        run = dataclasses.replace(run, settings=settings.lasting(len(run.train_set)))
    if METHODS[settings.method].trains:
        _check_trainer(run.settings)
    return run


def _check_trainer(settings: Settings) -> None:
    """Raises InputError if a schedule does not take its options, a tracker cannot be reported to, or the Hub takes nothing."""
    require("accelerate")
    if settings.push_to_hub is not None and is_first():
        check_login()
    make_schedule(torch.optim.SGD([torch.zeros(1, dtype=torch.float32, device="cpu")], lr=1.0), settings)
    try:
        for callback in require("transformers.integrations").get_reporting_integration_callbacks(settings.reports):
            callback()
    except (ImportError, RuntimeError, ValueError) as e:
        raise InputError(f"--report-to {settings.report_to}: {first_line(e)}") from None


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of CPU threads inside the block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
