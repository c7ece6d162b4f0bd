"""What a fine-tuning run is asked to do: one frozen description, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..kernels.checks import MAX_THREADS
from ..kernels.noise import LAWS, MAX_RANK
from ..model.config import PLACEMENTS, SCALINGS
from ..optim.normalise import NORMALISE
from ..optim.steps import BY_EXAMPLE, EVALUATIONS
from .command_line import check_options, option
from .methods import METHODS, Method, take_defaults
from .objectives import OBJECTIVES, ImageObjective
from .tasks import TASKS
from .together import check_parts, check_together

DTYPES = ("float32", "bfloat16", "float16")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SCHEDULES = (
    *("constant", "linear", "cosine", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"),
)
"""Those of transformers, but for the two that follow evaluations, which a journal does not have."""
_FINDING_STEPS = 50
"""The least steps of a run whose learning rate finds itself: the first eight only measure."""


def spell_dtype(settings: Any) -> None:
    """Gives the dtype of a dataclass of settings its whole name."""
    if isinstance(settings.dtype, str):
        object.__setattr__(settings, "dtype", SHORT_DTYPES.get(settings.dtype, settings.dtype))


_data, _method, _run = (functools.partial(option, group=group) for group in ("model and data", "method", "run"))
_trainer = functools.partial(option, group="as in the Trainer of transformers", later=True)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ``lozo-kernels finetune``, whose ``--help`` says what each means. None: the default of method, task or machine.

    What zeroth-order methods make of theirs is said by :class:`lozo_kernels.LOZO` and :class:`lozo_kernels.PatchConfig`.
    """

    model: str | None = _data(None, "name on the Hub or a folder (default: the embedded model)")
    trust_remote_code: bool = _data(False, "run Python code that comes with the model: only if you have read it")
    allow_missing_weights: bool = _data(False, "train layers that the checkpoint lacks from random weights")
    task: str | None = _data(None, "a task by name; an unknown name lists them", choices=tuple(TASKS))
    train_file: str | None = _data(None, "jsonl with text and, for classification, label; or text, one example a line")
    dev_file: str | None = _data(None, "as --train-file (default: a tenth of that file is held out)")
    data_dir: str | None = _data(None, "folder of TASK.train.jsonl and TASK.dev.jsonl, or of images (default: the Hub)")
    k_shot: int | None = _data(
        None, "train on so many examples of each class, with as many more as dev (16 or 512 in the papers)", low=1
    )
    num_train: int | None = _data(None, "train on so many examples (1000 in the papers; default: all)", low=1)
    num_dev: int | None = _data(
        None, "draw so many dev examples from the train ones (500 in the papers; default: those of the data)", low=1
    )
    num_eval: int | None = _data(None, "score so many test examples at the end (default: 1000 with --k-shot, --num-dev)", low=1)
    data_seed: int | None = _data(None, "seed of these draws (default: --seed)", low=0, high=2**63 - 1)
    num_shots: int = _data(32, "demonstrations of icl", hidden=True, low=1)
    max_new_tokens: int = _data(50, "tokens of a generated answer at most", low=1)
    objective: str = _data("auto", choices=("auto", *(name for name in OBJECTIVES if name != ImageObjective.name)))
    max_length: int = _data(256, "tokens per example", low=2)

    method: str = _method("lozo", choices=METHODS)
    rank: int = _method(None, "columns of U and V (default: 2, of agzo-split 4, of zo-muon 64)", low=1, high=MAX_RANK)
    interval: int = _method(None, "steps between two draws of V (default: 50, of zo-muon 100)", low=1)
    eps: float = _method(1e-3, "scale of the perturbation", low=0.0, above=0)
    find_eps: bool = _method(False, "measure eps on the first batch, in place of --eps: 192 forward passes")
    lr: float | None = _method(
        *(None, "learning rate (default: found from forward passes; the method's in runs of less than 50 steps)", "learning_rate"),
        low=0.0,
    )
    lr_schedule: str | None = _method(
        None,
        f"of transformers: {', '.join(SCHEDULES)} (default: the method's, constant or linear)",
        "lr_scheduler_type",
        choices=SCHEDULES,
    )
    momentum: float | None = _method(None, "beta of lozo-m and mezo-m (default: 0.9), and of ft-sgd", low=0.0, below=1)
    weight_decay: float = _method(0.0, "decoupled", low=0.0)
    scaling: str = _method("paper", "where 1/rank goes: paper, card or published", choices=SCALINGS)
    directions: int = _method(
        None, "directions per step (default: 1, of zo-muon 4, of grzo and agzo-split 8, the parts of a batch)", low=1
    )
    one_sided: bool = _method(
        None, "F(+) - F(0) in place of F(+) - F(-): all directions of a step share F(0) (default: only of zo-muon)"
    )
    normalise: str | None = _method(
        None, "divide c by its spread over the directions (FZOO) or by a running mean of its square; needs --lr", choices=NORMALISE
    )
    directions_law: str = _method("normal", "of dense directions: normal numbers, or rademacher for random signs", choices=LAWS)
    placement: str = _method(
        None,
        "inplace moves the weights, probe only reads them, or auto (default: inplace, of agzo-split probe)",
        choices=PLACEMENTS,
    )
    evaluation: str = _method(
        None,
        "of a step's points: sequential, batched in one forward pass, or split: each direction on its own part of the batch",
        choices=EVALUATIONS,
    )
    parallel: str | None = _method(
        None, "what processes share: examples or directions (default: examples, under torchrun)", choices=("examples", "directions")
    )

    steps: int | None = _run(None, "(default: 1000; 1500 without arguments)", "max_steps", low=1)
    batch_size: int = _run(16, "examples of a batch, of all processes together", low=1)
    eval_every: int | None = _run(None, "steps between evaluations (default: a tenth of the run)", "eval_steps", low=1)
    keep: str = _run("last", "weights of the last step, or best: of the lowest dev loss", choices=("last", "best"))
    eval_size: int = _run(500, "dev examples at most", low=1)
    compare_steps: int | None = _run(None, "time so many steps of the published way too (default: 0; 24 without arguments)", low=0)
    dtype: str = _run("float32", "float32, bfloat16 or float16; fp32, bf16, fp16 for short", choices=DTYPES)
    device: str = _run("auto", "cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    backend: str | None = _run(None, "backend of the kernels (default: the best for the device)")
    threads: int | None = _run(
        None, "on the CPU (default: torch's; one for the embedded model, which is too small to share)", low=1, high=MAX_THREADS
    )
    seed: int = _run(0, low=0, high=2**63 - 1)
    output: str | None = _run(
        None, "folder for the results (default: runs/TASK-METHOD, or with -2, -3, ... if a run is there)", "output_dir"
    )

    num_train_epochs: float | None = _trainer(None, "passes over the train examples, in place of --steps", low=0.0, above=0)
    gradient_accumulation_steps: int = _trainer(1, "batches whose mean loss is that of a step", low=1)
    warmup_steps: float = _trainer(0.0, "steps in which the learning rate rises from zero; below 1, a share of all", low=0.0)
    lr_scheduler_kwargs: str | None = _trainer(None, "options of --lr-schedule, as JSON: '{\"num_cycles\": 2}'")
    report_to: str | None = _trainer(None, "trackers, separated by commas: tensorboard, wandb, trackio, mlflow, ...")
    logging_steps: int = _trainer(10, "steps between two reports to them", low=1)
    save_steps: int | None = _trainer(None, "steps between checkpoints, checkpoint-N in --output (default: none)", low=1)
    save_total_limit: int | None = _trainer(None, "checkpoints that are kept (default: all)", low=1)

    peft: bool = _trainer(False, "train LoRA adapters of PEFT in place of the weights; model/ is then an adapter")
    lora_rank: int = _trainer(8, "columns of an adapter's factors", "lora_r", low=1)
    load_in_8bit: bool = _trainer(False, "quantise the linear layers by bitsandbytes, and train adapters on them (--peft)")
    load_in_4bit: bool = _trainer(False, "as --load-in-8bit, in NF4")
    push_to_hub: str | None = _trainer(None, "OWNER/NAME: a repository of the Hub, where the tuned model goes", "hub_model_id")

    def __post_init__(self) -> None:
        take_defaults(self)
        spell_dtype(self)

    def resolved(self) -> Settings:
        """These settings, checked, with every None replaced that has a fixed default and that the method uses; an ``lr`` that stays
        None finds itself.

        Raises:
            InputError: a setting is unknown, out of range, or names a file that is not there.
        """
        check_options(self)
        method = METHODS[self.method]
        check_together(self)
        demo = self.model is None and self.task is None and self.train_file is None
        comparable = demo and method.published and not self.unpublished
        file = self.train_file or self.dev_file
        task = self.task or (None if file else next(iter(TASKS)))
        common = dataclasses.replace(
            self,
            task=task,
            momentum=self._resolved_momentum(method),
            normalise="spread" if method.per_example and self.normalise is None else self.normalise,
            threads=1 if self.threads is None and self.model is None else self.threads,
            output=self.output or f"runs/{task or Path(str(file)).stem}-{self.method}",
        )
        if method.trains and self.num_train_epochs is None:
            steps = self.steps if self.steps is not None else 1500 if demo else 1000
            common = dataclasses.replace(
                common,
                lr=self._resolved_lr(method, steps),
                lr_schedule=self.lr_schedule or method.lr_schedule,
                steps=steps,
                eval_every=self.eval_every if self.eval_every is not None else max(1, steps // 10),
                compare_steps=self.compare_steps if self.compare_steps is not None else 24 if comparable else 0,
            )
        check_parts(common)
        return common

    def lasting(self, examples: int) -> Settings:
        """These settings with the steps that their epochs are, of so many train examples."""
        assert self.num_train_epochs is not None
        steps = math.ceil(self.num_train_epochs * examples / (self.batch_size * self.gradient_accumulation_steps))
        return dataclasses.replace(self, num_train_epochs=None, steps=steps).resolved()

    def warmup(self, steps: int) -> int:
        """Steps of a run of so many in which the learning rate rises."""
        return int(self.warmup_steps) if self.warmup_steps >= 1 else math.ceil(self.warmup_steps * steps)

    @property
    def schedule_options(self) -> dict[str, Any]:
        """Options of the schedule. Raises InputError if they are no JSON object."""
        try:
            options = json.loads(self.lr_scheduler_kwargs or "{}")
        except ValueError as e:
            raise InputError(f"--lr-scheduler-kwargs is a JSON object: {e}") from None
        if not isinstance(options, dict):
            raise InputError(f"--lr-scheduler-kwargs is a JSON object, not {self.lr_scheduler_kwargs!r:.100}")
        return options

    @property
    def reports(self) -> list[str]:
        """The trackers that are reported to."""
        return [name.strip() for name in (self.report_to or "").split(",") if name.strip()]

    @property
    def drawing_seed(self) -> int:
        """The seed of the draws of examples."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def unpublished(self) -> list[str]:
        """The options of these settings that the published code does not have."""
        given = {
            "--directions": self.directions > 1,
            "--one-sided": self.one_sided,
            "--normalise": self.normalise,
            f"--evaluation {self.evaluation}": self.evaluation in BY_EXAMPLE,
            "--gradient-accumulation-steps": self.gradient_accumulation_steps > 1,
            "--peft": self.peft,
        }
        return [name for name, there in given.items() if there]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)

    def recorded(self) -> dict[str, Any]:
        """As :meth:`to_dict`, as a journal has them: those of the Trainer only where they are not their defaults, so that the
        journals of runs without them stay what they were."""
        later = {f.name for f in dataclasses.fields(self) if f.metadata["help"].later and getattr(self, f.name) == f.default}
        return {name: value for name, value in self.to_dict().items() if name not in later}

    def _resolved_lr(self, method: Method, steps: int) -> float | None:
        """The learning rate; None for one that finds itself (``lr="auto"``), which needs some steps and a batch in parts."""
        if self.lr is not None:
            return self.lr
        if self.model is None and method.embedded_lr is not None:
            return method.embedded_lr
        found = method.kind == "zeroth-order" and method.finds_lr and steps >= _FINDING_STEPS and self.batch_size > 1
        return None if found else method.lr

    def _resolved_momentum(self, method: Method) -> float:
        if self.momentum is None or "momentum" not in method.uses:
            return method.momentum
        other = method.with_momentum(self.momentum)
        if method.kind == "zeroth-order" and other != method.name:
            raise InputError(f"--method {method.name} with --momentum {self.momentum:g} is --method {other}: ask for that")
        return self.momentum
