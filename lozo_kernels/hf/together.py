"""Which settings of a run go together, and whether what they name is there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..optim.steps import BY_EXAMPLE
from .command_line import flag
from .methods import DEFAULTS, METHODS, Method
from .tasks import TASKS


def check_together(s: Any) -> None:
    """Raises InputError if settings (:class:`~.settings.Settings`) contradict each other, mean nothing to their method, or name a
    file that is not there."""
    wrong = next((message for bad, message in _combinations(s, METHODS[s.method]) if bad), None)
    if wrong is not None:
        raise InputError(wrong)
    _check_data(s)
    _check_method(s, METHODS[s.method])


def check_parts(s: Any, processes: int = 1) -> None:
    """Raises InputError unless the batch of each process divides into parts for directions of their own; with a learning rate that
    finds itself, into halves of these."""
    halves = 2 if s.lr is None and s.num_train_epochs is None else 1
    if METHODS[s.method].splits(s.evaluation) and s.batch_size % (processes * s.directions * halves):
        each = f" in each of {processes} processes" if processes > 1 else ""
        cut = ", and without --lr these into halves" if halves > 1 else ""
        raise InputError(f"--directions {s.directions}: it divides the --batch-size, {s.batch_size}, into equal parts{each}{cut}")


def _combinations(s: Any, method: Method) -> list[tuple[bool, str]]:
    """Whether a combination is there, with what is wrong with it."""
    quantised = s.load_in_8bit or s.load_in_4bit
    return [
        (
            s.k_shot is not None and (s.num_train is not None or s.num_dev is not None),
            "--k-shot says how many train and dev examples there are: leave out --num-train and --num-dev",
        ),
        (
            bool(s.compare_steps and s.unpublished),
            f"--compare-steps: the published code has no {', '.join(s.unpublished)}",
        ),
        (
            s.evaluation in BY_EXAMPLE and s.placement == "inplace",
            f"--evaluation {s.evaluation} needs --placement probe: weights that are moved can be at one point only",
        ),
        (s.steps is not None and s.num_train_epochs is not None, "give --steps or --num-train-epochs, not both"),
        (s.save_total_limit is not None and s.save_steps is None, "--save-total-limit goes with --save-steps"),
        (s.load_in_8bit and s.load_in_4bit, "give --load-in-8bit or --load-in-4bit, not both"),
        (
            quantised and method.trains and not s.peft,
            "quantised weights stay as they are, and adapters on them are trained: --load-in-8bit and --load-in-4bit need --peft",
        ),
        (
            s.peft and method.name == "ft-lora",
            "--method ft-lora merges its adapters into the weights: leave out --peft, or give --method ft with it",
        ),
        (s.push_to_hub is not None and not _is_hub_name(s.push_to_hub), f"--push-to-hub is OWNER/NAME, not {s.push_to_hub}"),
        (s.find_eps and s.eps != 1e-3, "give --eps or --find-eps, not both"),
        (
            s.evaluation == "split" and s.parallel == "directions",
            "--evaluation split gives each direction examples of its own: leave out --parallel directions",
        ),
        (
            s.evaluation == "split" and (s.one_sided or s.directions < 2),
            "--evaluation split gives each direction a part of the batch: give --directions 2 or more, and leave out --one-sided",
        ),
        (
            bool(s.normalise) and s.lr is None and not method.per_example,
            "--normalise needs --lr: its rates have another scale, e.g. 1e-3",
        ),
        (
            s.normalise == "spread" and s.directions < 2,
            "--normalise spread is the spread over the directions of a step: give --directions 2 or more",
        ),
    ]


def _check_method(s: Any, method: Method) -> None:
    for f in dataclasses.fields(s):
        default = getattr(method, f.name) if f.name in DEFAULTS else f.default
        if f.name in method.foreign and getattr(s, f.name) not in (default, 0):
            raise InputError(f"{flag(f.name)} means nothing to --method {method.name}: leave it out")
    if method.kind == "first-order" and s.dtype == "float16":
        raise InputError(f"--method {method.name} needs --dtype float32 or bfloat16: gradients underflow in float16")
    if s.compare_steps and not method.published:
        raise InputError(f"--compare-steps: the published code has no {method.name}")


def _check_data(s: Any) -> None:
    for name in ("train_file", "dev_file"):
        value = getattr(s, name)
        if value is not None and not Path(value).is_file():
            raise InputError(f"{flag(name)}: there is no file {value}")
    images = s.task is not None and TASKS[s.task].kind == "image"
    if s.data_dir is not None and not Path(s.data_dir).is_dir() and not (images and _is_hub_name(s.data_dir)):
        raise InputError(f"--data-dir: there is no folder {s.data_dir}")
    if s.dev_file is not None and s.train_file is None and s.method != "zero-shot":
        raise InputError("--dev-file goes with --train-file")
    if s.train_file is not None and s.data_dir is not None:
        raise InputError("give --train-file or --data-dir, not both")
    if s.data_dir is not None and s.task is None:
        raise InputError(f"--data-dir goes with --task ({', '.join(TASKS)})")
    if s.model is not None:
        if s.task is None and s.train_file is None and s.dev_file is None:
            raise InputError(f"--model needs something to learn: --task ({', '.join(TASKS)}) or --train-file")
        _check_model_path(s.model)
    if s.output is not None:
        _check_output(Path(s.output))


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
