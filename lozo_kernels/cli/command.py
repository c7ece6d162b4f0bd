"""The command ``lozo-kernels``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..bench.arguments import Parser, path
from ..bench.document import progress
from ..errors import InputError, JournalError
from ..hf.command_line import add_options, read_config, read_options
from ..hf.data.splits import TEST_SIZE
from ..hf.demo.options import Demo
from ..hf.methods import EVALUATIONS
from ..hf.papers.scales import Request
from ..hf.planning.workload import Workload
from ..hf.settings import Settings
from ..kernels.registry import choose_backend
from ..kernels.version import __version__
from ..model.files import file_trouble
from .plugin import load_plugin

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_EVALUATED = (
    *("model", "trust_remote_code", "allow_missing_weights", "task", "data_dir", "train_file", "dev_file", "method", "num_shots"),
    *("num_eval", "objective", "max_length", "max_new_tokens", "batch_size", "dtype", "load_in_8bit", "load_in_4bit", "device"),
    *("threads", "seed"),
)
"""The settings of ``finetune`` that ``evaluate`` has too."""
_EVALUATED_OTHERWISE: dict[str, dict[str, Any]] = {
    "task": {"help": "a task by name; an unknown name lists them (default: that of the run)"},
    "data_dir": {"help": "folder of TASK.dev.jsonl, for icl also TASK.train.jsonl (default: the Hub)"},
    "train_file": {"help": "jsonl to take demonstrations from, and a tenth of it to score without --dev-file"},
    "dev_file": {"help": "jsonl of the examples to score"},
    "method": {"default": "zero-shot", "help": " or ".join(EVALUATIONS)},
    "num_eval": {"default": TEST_SIZE, "help": "examples at most"},
    "max_length": {"default": 2048, "help": "tokens of an input"},
    "batch_size": {"help": "inputs at once"},
    "load_in_8bit": {"help": "quantise the linear layers by bitsandbytes"},
    "seed": {"help": "seed of the draws of examples"},
}
"""What differs in their options."""

EXAMPLES = {
    "finetune": (
        "finetune",
        "finetune --model facebook/opt-125m --task sst2 --method lozo --steps 1000 --output runs/sst2",
        "finetune --model ./my-model --train-file notes.txt --placement probe --dtype bf16",
        "finetune config.yaml --lr 1e-6",
        "finetune --resume runs/sst2",
    ),
    "demo": ("demo", "demo --output runs/shown"),
    "evaluate": (
        "evaluate --model facebook/opt-1.3b --task squad --method icl --num-shots 8",
        "evaluate --checkpoint runs/sst2",
    ),
    "tasks": ("tasks", "tasks --json"),
    "plan": ("plan --model facebook/opt-13b", "plan --model facebook/opt-13b --method ft --dtype bf16 --batch-size 8"),
    "reproduce": ("reproduce --table lozo-opt", "reproduce --table lozo-opt --model facebook/opt-13b"),
    "compare": ("compare runs/a runs/b",),
    "replay": ("replay --journal runs/sst2 --output runs/again",),
    "revert": ("revert --journal runs/sst2 --step 400 --output runs/earlier",),
    "verify": ("verify --journal runs/sst2 --checkpoint runs/sst2",),
    "diff": ("diff runs/a runs/b",),
    "doctor": ("doctor", "doctor --json"),
    "tune": ("tune", "tune --seconds 600"),
}
"""What ``--help`` of a command shows at its end."""

_TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers of packages that transformers imports where they are installed, and that warn of parts which nothing here uses."""


class _Parser(Parser):
    """Reports a bad argument in one line, and ends the program."""

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except InputError as e:
            self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {e}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 (it failed), 2 (bad input) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: names in files may have what a terminal has not
    if argv[:1] == ["bench"]:  # all that follows is for the benchmarks, options such as --help included
        from ..bench import main as bench

        return bench(argv[1:])
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "config", None) is not None:
            args.defaults(**read_config(Settings, args.config))
            args = parser.parse_args(argv)  # again: what the line says goes before what the file says
        args.command = shlex.join(["lozo-kernels", *argv])
        run: Callable[[argparse.Namespace], int] = args.run
        _check_environment(args)
        for plugin in args.plugin:
            load_plugin(plugin)
        code = run(args)
        sys.stdout.flush()
        return code
    except (InputError, JournalError) as e:
        print(f"lozo-kernels {args.subcommand}: error: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt as e:
        print(f"lozo-kernels {args.subcommand}: interrupted; {str(e) or 'nothing was saved'}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as e:
        trouble = file_trouble(e)
        if trouble is None:
            raise
        print(f"lozo-kernels {args.subcommand}: error: {trouble}", file=sys.stderr)
        return EXIT_FAILED


def _check_environment(args: argparse.Namespace) -> None:
    """Raises InputError if a variable LOZO_KERNELS_* names a backend or an instruction set that is not there; doctor reports it."""
    with contextlib.suppress(RuntimeError):  # a backend for another device than the CPU
        try:
            if args.run is not _doctor:
                choose_backend("cpu")
        except ValueError as e:
            raise InputError(str(e)) from None


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line; what it returns has the function to call as ``run``."""
    parser = _Parser(prog="lozo-kernels", description="Fine-tune language models with forward passes only (LOZO, MeZO).")
    parser.add_argument("--version", action="version", version=f"lozo_kernels {__version__}")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module, or a file of Python, that registers an estimator, which --method then takes by its name",
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        shown = "\n".join(("examples:", *(f"  lozo-kernels {line}" for line in EXAMPLES[name])))
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=text, epilog=shown, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        return command

    _add_training(add)
    _add_papers(add)
    _add_journal(add)
    doctor = add("doctor", _doctor, "versions, devices, backends, and a self-test")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    tiles = add("tune", _tune, "measure tile sizes of the Triton kernels on this GPU, and use the fastest from then on")
    tiles.add_argument(
        "--output", type=path, help="file to write (default: one for this device in the user's cache, which is then used)"
    )
    tiles.add_argument(
        "--seconds", type=float, default=float("inf"), help="measure no more after these (default: until all is done)"
    )
    commands.add_parser("bench", help="benchmarks of the kernels and of whole steps; see bench --help")
    return parser


def _add_training(add: Callable[..., argparse.ArgumentParser]) -> None:
    finetune = add(
        "finetune",
        _finetune,
        "fine-tune a model; without arguments, a small embedded model on an embedded task, offline, in about two minutes",
    )
    finetune.add_argument("config", nargs="?", metavar="CONFIG.yaml", type=path, help="a file of settings; options go before it")
    finetune.set_defaults(defaults=finetune.set_defaults)
    groups = add_options(finetune, Settings)
    groups["run"].add_argument(
        "--resume",
        metavar="RUN_DIR",
        type=path,
        help="go on with a run that was ended or killed, by its journal; no other setting but --steps, to take more than it had",
    )
    groups["run"].add_argument("--overwrite", action="store_true", help="replace the run that is in --output")
    groups["run"].add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")
    groups["run"].add_argument("--quiet", action="store_true", help="no progress on stderr")

    demo = add("demo", _demo, "a small model learns, and what a step costs here; two screens and a picture, in two minutes")
    add_options(demo, Demo)
    demo.add_argument("--json", action="store_true", help="print what was found as JSON, and nothing else, on stdout")

    evaluate = add("evaluate", _evaluate, "score a model on a task: zero-shot, in-context, or after a run")
    evaluate.add_argument("--checkpoint", type=path, help="folder of a run, of a tuned model or of an adapter, to score instead")
    add_options(evaluate, Settings, _EVALUATED, _EVALUATED_OTHERWISE)
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
    evaluate.add_argument("--quiet", action="store_true", help="nothing on stderr")

    tasks = add("tasks", _tasks, "the tasks, methods and objectives that there are")
    tasks.add_argument("--json", action="store_true", help="print them as JSON")

    planner = add("plan", _plan, "memory and time of training a model, from its configuration alone")
    planner.add_argument("--model", required=True, type=_name, help="name on the Hub or a folder with config.json")
    add_options(planner, Workload)
    planner.add_argument("--json", action="store_true", help="print the plan as JSON")


def _add_papers(add: Callable[..., argparse.ArgumentParser]) -> None:
    table = add("reproduce", _reproduce, "a table of the papers, measured here beside the published numbers")
    add_options(table, Request)
    table.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")

    runs = add("compare", _compare, "runs of finetune side by side: a table and plots of curves, memory and time")
    runs.add_argument("runs", nargs="+", metavar="RUN_DIR", type=path, help="folders that finetune wrote")
    runs.add_argument(
        "--output", type=path, default="runs/compare", help="folder for curves.png and costs.png (default: %(default)s)"
    )


def _add_journal(add: Callable[..., argparse.ArgumentParser]) -> None:
    replay = add(
        "replay", _replay, "the model of a run, from the one that it started from and its journal, without data or forward passes"
    )
    revert = add("revert", _replay, "the model that a run had after some steps, and its journal up to there")
    verify = add("verify", _verify, "whether a tuned model is what the journal of its run says, bit for bit")
    for command in (replay, revert, verify):
        command.add_argument("--model", type=_name, help="the model that the run started from (default: what the journal names)")
        command.add_argument(
            "--trust-remote-code", action="store_true", help="run Python code that comes with the model: only if you have read it"
        )
        command.add_argument("--journal", required=True, type=path, help="the journal, or the folder of its run")
    verify.add_argument("--checkpoint", type=path, help="the tuned model or its run (default: the journal's fingerprint)")
    verify.add_argument("--step", type=int, help="the tuned model is that after so many steps (default: those of the run's model)")
    replay.add_argument("--step", type=int, help="steps to take (default: all)")
    revert.add_argument("--step", type=int, required=True, help="steps to take")
    for command in (replay, revert):
        command.add_argument("--output", required=True, type=path, help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace the run or the model that is in it")
    difference = add("diff", _diff, "where the journals of two runs part: the first record and field")
    difference.add_argument("journals", nargs=2, metavar="JOURNAL", type=path, help="a journal or the folder of its run")


def _name(text: str) -> str:
    """Parses what can be the name of a model, or a path."""
    path(text)
    return text


def _finetune(args: argparse.Namespace) -> int:
    from ..hf.finetune import finetune
    from ..hf.loop.journaling import settings_of
    from ..hf.loop.processes import is_first
    from ..hf.reports.summary import render_summary

    settings = read_options(Settings, args)
    if args.resume is not None:
        if settings != Settings(steps=settings.steps, trust_remote_code=settings.trust_remote_code) or args.overwrite:
            raise InputError("--resume takes all settings from the run: leave the others out, but --steps to take more")
        resumed = settings_of(args.resume, settings.steps)
        settings = dataclasses.replace(resumed, trust_remote_code=settings.trust_remote_code)
    if args.method in EVALUATIONS:
        return _print_evaluation(settings, args)
    summary = finetune(settings, command=args.command, quiet=args.quiet, resume=args.resume is not None, overwrite=args.overwrite)
    if is_first():
        _print(summary, args, render_summary)
    if summary["stopped"] is None:
        return 0
    saved = f"what there is was saved in {summary['output']}" if is_first() else "the first process saves what there is"
    print(
        f"lozo-kernels finetune: stopped after {summary['steps_done']} of {summary['settings']['steps']} steps: "
        f"{summary['stopped']}; {saved}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED if summary["stopped"] == "interrupted" else EXIT_FAILED


def _demo(args: argparse.Namespace) -> int:
    from ..hf.demonstrate import demonstrate

    found = demonstrate(read_options(Demo, args), show=(lambda _: None) if args.json else print, say=progress)
    return _print(found, args, lambda _: "") if args.json else 0


def _evaluate(args: argparse.Namespace) -> int:
    checkpoint = None if args.checkpoint is None else str(args.checkpoint)
    return _print_evaluation(read_options(Settings, args), args, checkpoint=checkpoint)


def _print_evaluation(settings: Any, args: argparse.Namespace, checkpoint: str | None = None) -> int:
    from ..hf.evaluate import evaluate, render_result

    return _print(evaluate(settings, checkpoint=checkpoint, command=args.command, quiet=args.quiet), args, render_result)


def _tasks(args: argparse.Namespace) -> int:
    from ..hf.reports.catalogue import catalogue, render_catalogue

    return _print(catalogue(), args, render_catalogue)


def _plan(args: argparse.Namespace) -> int:
    from ..hf.planning.plan_report import render_plan
    from ..hf.planning.planner import plan

    planned = plan(args.model, say=progress, **vars(read_options(Workload, args)))
    return _print(planned.to_dict(), args, lambda _: render_plan(planned))


def _reproduce(args: argparse.Namespace) -> int:
    from ..hf.papers.reproduce import reproduce

    document, text = reproduce(read_options(Request, args), args.command)
    return _print(document, args, lambda _: text)


def _compare(args: argparse.Namespace) -> int:
    from ..hf.reports.plots import compare_runs

    text, files = compare_runs(args.runs, args.output)
    print(text)
    print(f"saved: {', '.join(map(str, files))}")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from ..hf.audit import replay_run

    done = replay_run(
        args.model,
        args.journal,
        args.output,
        args.step,
        reverting=args.subcommand == "revert",
        overwrite=args.overwrite,
        trusted=args.trust_remote_code,
    )
    agrees = {True: "as the run ended", False: "", None: "the run recorded no fingerprint here"}[done["agrees"]]
    steps = f"{done['steps']} steps ({done['skipped']} without an update)"
    print(f"{steps} in {done['output']}; weights {done['fingerprint'][:16]}, {agrees}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..hf.audit import verify_run

    found = verify_run(args.model, args.journal, args.checkpoint, args.step, trusted=args.trust_remote_code)
    steps = found.replayed.steps
    if found.good:
        compared = f"{found.compared} parameters of the tuned model" if found.compared else "the fingerprint at its end"
        print(f"good: {steps} steps replayed, {compared} equal in every bit")
        return 0
    if found.differing:
        print(f"bad: after {steps} steps {len(found.differing)} parameters differ, e.g. {found.differing[0]}")
    elif found.replayed.agrees is False:
        print(f"bad: after {steps} steps the weights are not those with which the run ended")
    else:
        print(f"nothing to compare with: the run recorded no end after {steps} steps; give --checkpoint")
    return EXIT_FAILED


def _diff(args: argparse.Namespace) -> int:
    from ..hf.loop.journaling import read_run_journal
    from ..journal import diff

    found = diff(*map(read_run_journal, args.journals))
    print("the journals are equal" if found is None else found)
    return 0 if found is None else EXIT_FAILED


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import main as doctor

    return doctor(as_json=args.json)


def _tune(args: argparse.Namespace) -> int:
    from ..bench.tune import run

    return run(args.output, args.seconds, args.command)


def _print(result: dict[str, Any], args: argparse.Namespace, render: Callable[[dict[str, Any]], str]) -> int:
    """Prints a result as JSON or for a reader, as the command line asks."""
    from ..hf.output import to_json

    print(to_json(result, indent=2) if args.json else render(result))
    return 0
