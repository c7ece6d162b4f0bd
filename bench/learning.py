"""Does it learn? Real models on real text, every method at its best learning rate of a stated grid, three seeds.

``python -m bench.learning llama`` adapts the 260K-parameter Llama of the data folder to SST-2 sentences (language modelling, all
weights) and writes ``bench/results/learning_llama.json``. ``python -m bench.learning minilm`` puts a classifier on the real MiniLM
encoder, fits it on 64 reviews of SST-2, and goes on with the last LayerNorm and the classifier on 1,024 reviews (512 a class),
AdamW on the same batches beside the zeroth-order methods: ``bench/results/learning_minilm.json``. What lies below does not change,
so its outputs are computed once. Each writes a plot beside its document. ``--steps 20 --seeds 1`` tries a part.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import starmap
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

from bench.evidence import made_by, result_parser, write_result
from bench.plots import learning, save
from lozo_kernels import LOZO, MeZO, SubZero
from lozo_kernels.bench.environment import OtherLoad
from python_tests import hf_helpers

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: ``make(model, lr, seed)`` returns something with ``step(closure)``; ``grid`` has the learning rates to try."""

    name: str
    make: Callable[[nn.Module, float, int], Any]
    grid: tuple[float, ...]


class Gradient:
    """AdamW as an optimiser whose step calls a closure."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self._optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            loss = closure()
            loss.backward()
        self._optimizer.step()
        return loss.detach()


def zeroth_order(grid: tuple[float, ...], eps: float = 1e-3) -> tuple[Method, ...]:
    """LOZO, LOZO-M, MeZO and SubZero with the published kind of settings; each has the same grid."""
    return (
        Method("lozo", lambda m, lr, seed: LOZO(m, lr=lr, eps=eps, rank=2, interval=50, seed=seed), grid),
        Method("lozo-m", lambda m, lr, seed: LOZO(m, lr=lr, eps=eps, rank=2, interval=50, momentum=0.9, seed=seed), grid),
        Method("mezo", lambda m, lr, seed: MeZO(m, lr=lr, eps=eps, seed=seed), grid),
        Method("subzero", lambda m, lr, seed: SubZero(m, lr=lr, eps=eps, rank=8, interval=500, seed=seed), grid),
    )


def read(name: str) -> list[Row]:
    """Reads the rows of a file of the data folder."""
    lines = (hf_helpers.data_folder() / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yields indices of examples without end, each pass over them in a new order."""
    generator = torch.Generator().manual_seed(seed)
    rest: list[int] = []
    while True:
        while len(rest) < size:
            rest += torch.randperm(count, generator=generator).tolist()
        yield rest[:size]
        rest = rest[size:]


class Llama:
    """Language modelling on the sentences of SST-2, 48 tokens at most."""

    name, unit, better = "260K-parameter Llama on SST-2 sentences", "dev loss, per token", "lower"
    steps, every, batch = 2000, 200, 16
    methods = zeroth_order((5e-5, 1e-4, 2e-4))
    settings: ClassVar[Row] = {
        "parameters": "all",
        "rank": "2 (SubZero 8)",
        "interval": "50 (SubZero 500)",
        "eps": 1e-3,
        "max_length": 48,
    }

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = hf_helpers.convert_stories260k(hf_helpers.data_folder(), Path(self._folder.name) / "stories260K")
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self._path = path
        self._train = [self._encode(row["text"]) for row in read("sst2.train.jsonl")]
        self._dev = sorted((self._encode(row["text"]) for row in read("sst2.dev.jsonl")), key=len)
        self.examples = {"train": len(self._train), "dev": len(self._dev)}

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, truncation=True, max_length=48)["input_ids"]

    def model(self) -> nn.Module:
        return transformers.AutoModelForCausalLM.from_pretrained(self._path, dtype=torch.float32).eval()

    def loss(self, model: nn.Module, index: Sequence[int]) -> Tensor:
        sums, tokens = self.losses(model, index)
        return sums.sum() / tokens.sum()

    def losses(self, model: nn.Module, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of each example, and how many they are."""
        return self._losses(model, [self._train[i] for i in index])

    def score(self, model: nn.Module) -> Row:
        parts = [self._losses(model, self._dev[i : i + 64]) for i in range(0, len(self._dev), 64)]
        sums, tokens = map(torch.cat, zip(*parts, strict=True))
        return {"loss": float(sums.sum() / tokens.sum())}

    def figure(self, scores: Row) -> float:
        return scores["loss"]

    def _losses(self, model: nn.Module, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        tokens = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        return tokens.view_as(labels).sum(1), (labels >= 0).sum(1)


class Top(nn.Module):
    """The last LayerNorm of an encoder, the mean over tokens, and a classifier."""

    def __init__(self, last: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.last, self.classifier = last, classifier

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(self.pooled(hidden, mask))

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return (self.outputs(hidden, mask) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def outputs(self, hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002  (for a whole layer)
        return self.last(hidden)


class MiniLM:
    """SST-2 with a classifier on MiniLM (22.7M parameters). The last LayerNorm and the classifier are trained, 1,538 parameters."""

    top = Top
    name, unit, better = "MiniLM on SST-2: last LayerNorm and classifier", "dev accuracy, %", "higher"
    steps, every, batch = 20_000, 1000, 32
    methods = (*zeroth_order((3e-4, 1e-3, 3e-3)), Method("adamw", lambda m, lr, _: Gradient(m, lr), (1e-4, 3e-4, 1e-3)))
    settings: ClassVar[Row] = {
        "parameters": "last LayerNorm and classifier",
        "start": "classifier fitted on 64 examples (logistic regression, L2 0.01), the encoder as published",
        "rank": "2 (SubZero 8)",
        "interval": "50 (SubZero 500)",
        "eps": 1e-3,
        "max_length": 48,
    }

    def __init__(self, per_class: int = 512) -> None:
        path = hf_helpers.minilm_folder()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        encoder = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        self._last = self.last_of(encoder)
        rows = read("sst2.train.jsonl")
        random.Random(0).shuffle(rows)
        few = [[row for row in rows if row["label"] == label][:per_class] for label in (0, 1)]
        mixed = [row for pair in zip(*few, strict=True) for row in pair]  # so that the first 64 have 32 of each class
        self._train = self._hidden(encoder, mixed)
        self._dev = self._hidden(encoder, read("sst2.dev.jsonl"))
        self.examples = {"fitted": 64, "train": len(mixed), "dev": len(self._dev[0])}
        self._classifier = self._fit([part[:64] for part in self._train])

    def last_of(self, encoder: Any) -> nn.Module:
        """The part of the encoder that is trained."""
        return encoder.encoder.layer[-1].output.LayerNorm

    @torch.no_grad()
    def _hidden(self, encoder: nn.Module, rows: Sequence[Row]) -> list[Tensor]:
        """Returns what enters the part that is trained, the mask, and the labels."""
        inputs = self._tokenizer([row["text"] for row in rows], truncation=True, max_length=48, padding=True, return_tensors="pt")
        hidden: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda _, args: hidden.append(args[0].clone()))
        for i in range(0, len(rows), 64):
            encoder(**{key: value[i : i + 64] for key, value in inputs.items()})
        hook.remove()
        return [torch.cat(hidden), inputs["attention_mask"], torch.tensor([row["label"] for row in rows])]

    def _fit(self, few: list[Tensor]) -> nn.Linear:
        classifier = nn.Linear(384, 2)
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        top = self.top(self._last, classifier)
        with torch.no_grad():
            features = top.pooled(few[0], few[1])
        optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(classifier(features), few[2]) + 0.01 * classifier.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return classifier

    def model(self) -> nn.Module:
        return copy.deepcopy(self.top(self._last, self._classifier))

    def loss(self, model: nn.Module, index: Sequence[int]) -> Tensor:
        return self.losses(model, index)[0].mean()

    def losses(self, model: nn.Module, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of each example, and 1."""
        hidden, mask, labels = (part[list(index)] for part in self._train)
        longest = int(mask.sum(1).max())
        logits = model(hidden[:, :longest], mask[:, :longest])
        return nn.functional.cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)

    def score(self, model: nn.Module) -> Row:
        hidden, mask, labels = self._dev
        logits = torch.cat(list(starmap(model, zip(hidden.split(64), mask.split(64), strict=True))))
        return {
            "accuracy": 100 * float((logits.argmax(-1) == labels).float().mean()),
            "loss": float(nn.functional.cross_entropy(logits, labels)),
        }

    def figure(self, scores: Row) -> float:
        return -scores["accuracy"]


TASKS: dict[str, type[Llama] | type[MiniLM]] = {"llama": Llama, "minilm": MiniLM}


@torch.no_grad()
def run(task: Llama | MiniLM, method: Method, lr: float, seed: int, steps: int) -> Row:
    """Trains once; returns scores every so often, with the time that steps took."""
    model = task.model()
    model.eval()
    order = batches(task.examples["train"], task.batch, seed)
    points, seconds = [{"step": 0, "seconds": 0.0, **task.score(model)}], 0.0
    optimizer = method.make(model, lr, seed)
    for step in range(1, steps + 1):
        index = next(order)
        start = time.perf_counter()
        loss = optimizer.step(lambda index=index: task.loss(model, index))
        seconds += time.perf_counter() - start
        if not bool(torch.isfinite(loss)):
            break
        if step % task.every == 0 or step == steps:
            points.append({"step": step, "seconds": round(seconds, 2), **task.score(model)})
    return {"method": method.name, "lr": lr, "seed": seed, "points": points}


def measure(task: Llama | MiniLM, steps: int, seeds: int, save_so_far: Callable[[list[Row]], None]) -> None:
    """Tries the grid with seed 0, then the other seeds at the best learning rate."""
    runs: list[Row] = []
    for method in task.methods:
        tried = []
        for lr in method.grid:
            tried.append(run(task, method, lr, 0, steps))
            print(f"{method.name} lr {lr:g} seed 0: {tried[-1]['points'][-1]}", flush=True)
        best = min(tried, key=lambda r: task.figure(r["points"][-1]))
        for row in tried:
            row["best"] = row is best
        runs += tried
        for seed in range(1, seeds):
            runs.append(run(task, method, best["lr"], seed, steps) | {"best": True})
            print(f"{method.name} lr {best['lr']:g} seed {seed}: {runs[-1]['points'][-1]}", flush=True)
        save_so_far(runs)


def main(argv: list[str] | None = None) -> int:
    parser = result_parser(__doc__, "learning_TASK.json")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = TASKS[args.task]()
    steps = args.steps or task.steps
    output = args.output.with_name(args.output.name.replace("TASK", args.task))
    others, where = OtherLoad(), made_by("bench.learning", argv)
    what = {"task": task.name, "unit": task.unit, "better": task.better, "steps": steps, "batch_size": task.batch}
    document = where | what | {"settings": task.settings, "examples": task.examples}
    document["grid"] = {m.name: m.grid for m in task.methods}

    def save_so_far(runs: list[Row]) -> None:
        done = document | {"cpus_used_by_others": others.mean(), "runs": runs}
        write_result(done, output)
        save(learning(done), done, output.with_suffix(".png"))

    measure(task, steps, args.seeds, save_so_far)
    return 0


if __name__ == "__main__":
    sys.exit(main())
