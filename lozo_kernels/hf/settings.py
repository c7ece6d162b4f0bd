"""What a fine-tuning run is asked to do: one frozen description, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..kernels.noise import MAX_RANK
from ..model.config import PLACEMENTS, SCALINGS
from .methods import METHOD_SETTINGS, METHODS, TRAINING_SETTINGS, Method
from .tasks import TASKS

OBJECTIVES = ("auto", "classification", "prompt", "masked", "choice", "answer", "lm")
PARALLEL = ("examples", "directions")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16", "float16")
KEEPS = ("last", "best")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of ``lozo-kernels finetune``. None means: the default of the method, the task or the machine.

    Attributes:
        model: Hub name or folder; None: the embedded model.
        task: a name of the task table; None: what ``train_file`` holds, or the embedded task without one.
        train_file, dev_file: jsonl, or text with one example a line; without ``dev_file`` a tenth of ``train_file`` is held out.
        data_dir: folder of <task>.train.jsonl and <task>.dev.jsonl.
        k_shot: examples of each class to train on and, as many, to keep as dev (16 or 512 in the papers).
        num_train, num_dev: examples to draw from those for training (1,000 and 500 in the papers); None: all, and the dev examples
            are those of the file or split for that. With either of k_shot and num_dev, the latter become test examples.
        num_eval: test examples at most (1,000 in the papers), which are scored once, at the end.
        data_seed: of all these draws; None: ``seed``.
        num_shots, max_new_tokens: demonstrations of in-context learning, and tokens of a generated answer, at most.
        objective: "classification" (a head), "prompt" (label words of a causal model), "masked" (those of a masked one), "choice"
            (options of several tokens), "answer" (the right answer token by token), "lm", or "auto".
        method: a name of the method table.
        rank, interval, eps, lr, momentum, weight_decay, scaling, directions, seed, backend: see :class:`lozo_kernels.LOZO`
            and :class:`lozo_kernels.PatchConfig`.
        placement: "inplace", "probe" or "auto": whether weights are moved, see :class:`lozo_kernels.PatchConfig`.
        parallel: what processes that torchrun started share: "examples" of each batch, or "directions".
        lr_schedule: "constant", "linear" or "cosine", the latter two to zero; None: the method's.
        eval_every: steps between evaluations; None: a tenth of the run.
        keep: the weights of the "last" step, or those with the "best" dev loss, as the papers' code keeps them.
        eval_size: dev examples to evaluate on at most.
        threads: CPU threads; None: one for the embedded model, which is too small to share, otherwise torch's default.
        compare_steps: steps of the published implementation to time beside this library's, on copies of the model.
        output: folder for the results; None: runs/<task>-<method>.
    """

    model: str | None = None
    task: str | None = None
    train_file: str | None = None
    dev_file: str | None = None
    data_dir: str | None = None
    k_shot: int | None = None
    num_train: int | None = None
    num_dev: int | None = None
    num_eval: int | None = None
    data_seed: int | None = None
    num_shots: int = 32
    max_new_tokens: int = 50
    objective: str = "auto"
    method: str = "lozo"
    rank: int = 2
    interval: int = 50
    eps: float = 1e-3
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float = 0.0
    lr_schedule: str | None = None
    scaling: str = "paper"
    directions: int = 1
    placement: str = "inplace"
    parallel: str | None = None
    steps: int | None = None
    batch_size: int = 16
    max_length: int = 256
    eval_every: int | None = None
    keep: str = "last"
    eval_size: int = 500
    compare_steps: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    backend: str | None = None
    threads: int | None = None
    seed: int = 0
    output: str | None = None

    def resolved(self) -> Settings:
        """These settings, checked, with every None replaced that has a fixed default and that the method uses.

        Raises:
            InputError: a setting is unknown, out of range, or names a file that is not there.
        """
        self._check_names()
        self._check_numbers()
        self._check_files()
        method = METHODS[self.method]
        self._check_method(method)
        demo = self.model is None and self.task is None and self.train_file is None
        comparable = demo and self.directions == 1 and method.published
        task = self.task or (None if self.train_file else next(iter(TASKS)))
        common = dataclasses.replace(
            self,
            task=task,
            momentum=self._resolved_momentum(method),
            threads=1 if self.threads is None and self.model is None else self.threads,
            output=self.output or f"runs/{task or Path(str(self.train_file)).stem}-{self.method}",
        )
        if not method.trains:
            return common
        steps = self.steps if self.steps is not None else 1500 if demo else 1000
        return dataclasses.replace(
            common,
            lr=self.lr if self.lr is not None else method.embedded_lr if self.model is None else method.lr,
            lr_schedule=self.lr_schedule or method.lr_schedule,
            steps=steps,
            eval_every=self.eval_every if self.eval_every is not None else max(1, steps // 10),
            compare_steps=self.compare_steps if self.compare_steps is not None else 24 if comparable else 0,
        )

    @property
    def drawing_seed(self) -> int:
        """What the draws of examples depend on."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def _resolved_momentum(self, method: Method) -> float:
        if self.momentum is None or "momentum" not in method.uses:
            return method.momentum
        other = method.with_momentum(self.momentum)
        if method.kind == "zeroth-order" and other != method.name:
            raise InputError(f"--method {method.name} with --momentum {self.momentum:g} is --method {other}: ask for that")
        return self.momentum

    def _check_names(self) -> None:
        for option, value, known in (
            ("--method", self.method, METHODS),
            ("--task", self.task, TASKS),
            ("--objective", self.objective, OBJECTIVES),
            ("--lr-schedule", self.lr_schedule, SCHEDULES),
            ("--scaling", self.scaling, SCALINGS),
            ("--placement", self.placement, PLACEMENTS),
            ("--keep", self.keep, KEEPS),
            ("--parallel", self.parallel, PARALLEL),
            ("--dtype", self.dtype, DTYPES),
        ):
            if value is not None and value not in known:
                raise InputError(f"{option} {value!r} is not known; there are {', '.join(known)}")

    def _check_method(self, method: Method) -> None:
        foreign = {name for name in METHOD_SETTINGS if name not in method.uses}
        foreign |= set() if method.trains else TRAINING_SETTINGS
        foreign |= set() if method.name == "icl" else {"num_shots"}
        for f in dataclasses.fields(self):
            if f.name in foreign and getattr(self, f.name) not in (f.default, 0):
                raise InputError(f"{_option(f.name)} means nothing to --method {method.name}: leave it out")
        if method.kind == "first-order" and self.dtype == "float16":
            raise InputError(f"--method {method.name} needs --dtype float32 or bfloat16: gradients underflow in float16")
        if self.compare_steps and not method.published:
            raise InputError(f"--compare-steps: the published code has no {method.name}")

    def _check_numbers(self) -> None:
        for name, low in (
            ("rank", 1),
            ("interval", 1),
            ("directions", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("max_length", 2),
            ("k_shot", 1),
            ("num_train", 1),
            ("num_dev", 1),
            ("num_eval", 1),
            ("data_seed", 0),
            ("num_shots", 1),
            ("max_new_tokens", 1),
            ("eval_every", 1),
            ("eval_size", 1),
            ("compare_steps", 0),
            ("threads", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{_option(name)} is at least {low}, not {value}")
        if self.rank > MAX_RANK:
            raise InputError(f"--rank is at most {MAX_RANK}, not {self.rank}")
        if self.seed >= 2**63:
            raise InputError(f"--seed is below 2**63, not {self.seed}")
        for name in ("eps", "lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_option(name)} is a finite number of at least 0, not {value}")
        if self.k_shot is not None and (self.num_train is not None or self.num_dev is not None):
            raise InputError("--k-shot says how many train and dev examples there are: leave out --num-train and --num-dev")
        if self.eps == 0:
            raise InputError("--eps is above 0, not 0")
        if self.compare_steps and self.directions > 1:
            raise InputError("--compare-steps goes with --directions 1: the published code has one direction a step")
        if self.momentum is not None and self.momentum >= 1:
            raise InputError(f"--momentum is below 1, not {self.momentum}")

    def _check_files(self) -> None:
        for name in ("train_file", "dev_file"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise InputError(f"{_option(name)}: there is no file {value}")
        images = self.task is not None and TASKS[self.task].kind == "image"
        if self.data_dir is not None and not Path(self.data_dir).is_dir() and not (images and _is_hub_name(self.data_dir)):
            raise InputError(f"--data-dir: there is no folder {self.data_dir}")
        if self.dev_file is not None and self.train_file is None and (self.method != "zero-shot" or self.task is None):
            needs = "--task" if self.method == "zero-shot" else "--train-file"
            raise InputError(f"--dev-file goes with {needs}")
        if self.train_file is not None and self.data_dir is not None:
            raise InputError("give --train-file or --data-dir, not both")
        if self.data_dir is not None and self.task is None:
            raise InputError(f"--data-dir goes with --task ({', '.join(TASKS)})")
        if self.model is not None:
            if self.task is None and self.train_file is None:
                raise InputError(f"--model needs something to learn: --task ({', '.join(TASKS)}) or --train-file")
            _check_model_path(self.model)
        if self.output is not None:
            _check_output(Path(self.output))


def _check_model_path(model: str) -> None:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"--model: the folder {model} has no config.json")
        return
    # A Hub name is "name" or "owner/name": anything else can only be meant as a path.
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise InputError(f"--model: there is no folder {model}")


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name[0] not in "./"


def _check_output(output: Path) -> None:
    for path in (output, *output.parents):
        if path.exists():
            if not path.is_dir():
                raise InputError(f"--output: {path} is a file")
            return


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
