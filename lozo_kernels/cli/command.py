"""The command ``lozo-kernels``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..kernels.version import __version__
from ..errors import InputError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 1 (it failed), 2 (bad input) or 130 (Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["bench"]:  # all that follows is for the benchmarks, options such as --help included
        return _bench(argv[1:])
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace, str], int] = args.run
    try:
        return run(args, shlex.join(["lozo-kernels", *argv]))
    except InputError as e:
        print(f"lozo-kernels {args.subcommand}: error: {e}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"lozo-kernels {args.subcommand}: interrupted; nothing was saved", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    from ..hf.methods import METHODS
    from ..hf.settings import DTYPES, SCHEDULES, Settings
    from ..hf.settings import OBJECTIVES as objectives

    parser = _Parser(prog="lozo-kernels", description="Fine-tune language models with forward passes only (LOZO, MeZO).")
    parser.add_argument("--version", action="version", version=f"lozo_kernels {__version__}")
    commands = parser.add_subparsers(dest="subcommand", required=True, parser_class=_Parser)

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a model; without arguments, a small embedded model on an embedded task, offline, in about two minutes",
    )
    finetune.set_defaults(run=_finetune)
    d = Settings()
    data = finetune.add_argument_group("model and data")
    data.add_argument("--model", help="name on the Hub or a folder (default: the embedded model)")
    data.add_argument("--task", help="a task by name; an unknown name lists them")
    data.add_argument("--train-file", help="jsonl with text and, for classification, label; or text, one example a line")
    data.add_argument("--dev-file", help="as --train-file (default: a tenth of that file is held out)")
    data.add_argument("--data-dir", help="folder of TASK.train.jsonl and TASK.dev.jsonl, or of images (default: the Hub)")
    data.add_argument("--k-shot", type=int, help="train on so many examples of each class, with as many more as dev")
    data.add_argument("--num-train", type=int, help="train on so many examples (default: all)")
    data.add_argument("--num-dev", type=int, help="draw so many dev examples from the train ones (default: those of the data)")
    data.add_argument(
        "--num-eval", type=int, help="score so many test examples at the end (default: 1000 with --k-shot, --num-dev)"
    )
    data.add_argument("--data-seed", type=int, help="of these draws (default: --seed)")
    data.add_argument("--num-shots", type=int, default=d.num_shots, help=argparse.SUPPRESS)  # of evaluate --method icl
    data.add_argument(
        "--max-new-tokens", type=int, default=d.max_new_tokens, help="of a generated answer at most (default: %(default)s)"
    )
    data.add_argument("--objective", default=d.objective, help=f"{', '.join(objectives)} (default: %(default)s)")
    data.add_argument("--max-length", type=int, default=d.max_length, help="tokens per example (default: %(default)s)")

    method = finetune.add_argument_group("method")
    method.add_argument("--method", default=d.method, help=f"{', '.join(METHODS)} (default: %(default)s)")
    method.add_argument("--rank", type=int, default=d.rank, help="columns of U and V (default: %(default)s)")
    method.add_argument("--interval", type=int, default=d.interval, help="steps between two draws of V (default: %(default)s)")
    method.add_argument("--eps", type=float, default=d.eps, help="scale of the perturbation (default: %(default)s)")
    method.add_argument("--lr", type=float, help="learning rate (default: the method's; tuned values for the embedded model)")
    method.add_argument("--lr-schedule", default=d.lr_schedule, help=f"{', '.join(SCHEDULES)} (default: the method's)")
    method.add_argument("--momentum", type=float, help="beta of lozo-m and mezo-m (default: 0.9), and of ft-sgd")
    method.add_argument("--weight-decay", type=float, default=d.weight_decay, help="decoupled (default: %(default)s)")
    method.add_argument("--scaling", default=d.scaling, help="where 1/rank goes: paper, card or published (default: %(default)s)")
    method.add_argument("--directions", type=int, default=d.directions, help="directions per step (default: %(default)s)")
    method.add_argument(
        "--placement", default=d.placement, help="inplace moves the weights, probe only reads them, or auto (default: %(default)s)"
    )
    method.add_argument("--parallel", help="what processes share: examples or directions (default: examples, under torchrun)")

    run = finetune.add_argument_group("run")
    run.add_argument("--steps", type=int, help="(default: 1000; 1500 without arguments)")
    run.add_argument("--batch-size", type=int, default=d.batch_size, help="(default: %(default)s)")
    run.add_argument("--eval-every", type=int, help="steps between evaluations (default: a tenth of the run)")
    run.add_argument(
        "--keep", default=d.keep, help="weights of the last step, or best: of the lowest dev loss (default: %(default)s)"
    )
    run.add_argument("--eval-size", type=int, default=d.eval_size, help="dev examples at most (default: %(default)s)")
    run.add_argument(
        "--compare-steps", type=int, help="time so many steps of the published way too (default: 0; 24 without arguments)"
    )
    run.add_argument("--dtype", default=d.dtype, help=f"{', '.join(DTYPES)} (default: %(default)s)")
    run.add_argument("--device", default=d.device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    run.add_argument("--backend", help="of the kernels (default: the best for the device)")
    run.add_argument("--threads", type=int, help="on the CPU (default: torch's; one for the embedded model)")
    run.add_argument("--seed", type=int, default=d.seed, help="(default: %(default)s)")
    run.add_argument("--output", help="folder for the results (default: runs/TASK-METHOD)")
    run.add_argument(
        "--resume", metavar="RUN_DIR", help="go on with a run that was ended or killed, by its journal; no other setting"
    )
    run.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")

    _add_evaluate(commands)
    _add_reproduce(commands)
    _add_plan(commands)
    _add_journal(commands)

    doctor = commands.add_parser("doctor", help="versions, devices, backends, and a self-test")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    tiles = commands.add_parser(
        "tune", help="measure tile sizes of the Triton kernels on this GPU, and use the fastest from then on"
    )
    tiles.set_defaults(run=_tune)
    tiles.add_argument("--output", help="file to write (default: one for this device in the user's cache, which is then used)")
    tiles.add_argument(
        "--seconds", type=float, default=float("inf"), help="measure no more after these (default: until all is done)"
    )

    commands.add_parser("bench", help="benchmarks of the kernels and of whole steps; see bench --help")
    return parser


def _finetune(args: argparse.Namespace, command: str) -> int:
    import dataclasses

    from ..hf.finetune import finetune
    from ..hf.loop.processes import counted
    from ..hf.loop.records import to_json
    from ..hf.methods import METHODS
    from ..hf.reports.summary import table
    from ..hf.settings import Settings

    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    if args.resume is not None:
        settings = _resumed(args.resume, settings)
    if args.method in METHODS and not METHODS[args.method].trains:
        return _print_evaluation(settings, None, args, command)
    summary = finetune(settings, command=command, quiet=args.quiet, resume=args.resume is not None)
    if counted()[0] == 0:
        print(to_json(summary, indent=2) if args.json else table(summary))
    if summary["stopped"] is None:
        return 0
    saved = f"what there is was saved in {summary['output']}" if counted()[0] == 0 else "the first process saves what there is"
    print(
        f"lozo-kernels finetune: stopped after {summary['steps_done']} of {summary['settings']['steps']} steps: "
        f"{summary['stopped']}; {saved}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED if summary["stopped"] == "interrupted" else EXIT_FAILED


def _resumed(folder: str, given: Any) -> Any:
    from pathlib import Path

    from ..hf.loop.journaling import settings_of
    from ..hf.settings import Settings

    if given != Settings():
        raise InputError("--resume takes all settings from the run: leave the others out")
    return settings_of(Path(folder))


def _add_journal(commands: Any) -> None:
    what = {
        "replay": "the model of a run, from the one that it started from and its journal, without data or forward passes",
        "revert": "the model that a run had after some steps, and its journal up to there",
        "verify": "whether a tuned model is what the journal of its run says, bit for bit",
    }
    for name, text in what.items():
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=_verify if name == "verify" else _replay)
        command.add_argument("--model", help="the model that the run started from (default: what the journal names)")
        command.add_argument("--journal", required=True, help="the journal, or the folder of its run")
        if name == "verify":
            command.add_argument("--checkpoint", help="the tuned model or its run (default: the journal's fingerprint)")
            command.add_argument("--step", type=int, help="the tuned model is that after so many steps (default: all)")
            continue
        needed = name == "revert"
        command.add_argument("--step", type=int, required=needed, help="steps to take" + ("" if needed else " (default: all)"))
        command.add_argument("--output", required=True, help="folder to write")
    difference = commands.add_parser("diff", help="where the journals of two runs part: the first record and field")
    difference.set_defaults(run=_diff)
    difference.add_argument("journals", nargs=2, metavar="JOURNAL", help="a journal or the folder of its run")


def _replay(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from ..hf.loop.journaling import find_journal, replay_run

    reverting = args.subcommand == "revert"
    done = replay_run(args.model, find_journal(Path(args.journal)), Path(args.output), args.step, reverting=reverting)
    agrees = {True: "as the run ended", False: "", None: "the run recorded no fingerprint here"}[done["agrees"]]
    steps = f"{done['steps']} steps ({done['skipped']} without an update)"
    print(f"{steps} in {done['output']}; weights {done['fingerprint'][:16]}, {agrees}")
    return 0


def _verify(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from ..hf.loop.journaling import find_journal, verify_run

    checkpoint = Path(args.checkpoint) if args.checkpoint else None
    found = verify_run(args.model, find_journal(Path(args.journal)), checkpoint, args.step)
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


def _diff(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from ..hf.loop.journaling import diff_runs

    found = diff_runs(Path(args.journals[0]), Path(args.journals[1]))
    print("the journals are equal" if found is None else found)
    return 0 if found is None else EXIT_FAILED


def _add_evaluate(commands: Any) -> None:
    from ..hf.settings import DTYPES, OBJECTIVES, Settings

    evaluate = commands.add_parser("evaluate", help="score a model on a task: zero-shot, in-context, or after a run")
    evaluate.set_defaults(run=_evaluate)
    d = Settings()
    evaluate.add_argument("--model", help="name on the Hub or a folder (default: the embedded model)")
    evaluate.add_argument("--checkpoint", help="folder of a run, of a tuned model or of an adapter, to score instead")
    evaluate.add_argument("--task", help="a task by name; an unknown name lists them (default: that of the run)")
    evaluate.add_argument("--data-dir", help="folder of TASK.dev.jsonl, for icl also TASK.train.jsonl (default: the Hub)")
    evaluate.add_argument("--train-file", help="jsonl to take demonstrations from, and a tenth of it to score without --dev-file")
    evaluate.add_argument("--dev-file", help="jsonl of the examples to score")
    evaluate.add_argument("--method", default="zero-shot", help="zero-shot or icl (default: %(default)s)")
    evaluate.add_argument("--num-shots", type=int, default=d.num_shots, help="demonstrations of icl (default: %(default)s)")
    evaluate.add_argument("--num-eval", type=int, default=1000, help="examples at most (default: %(default)s)")
    evaluate.add_argument("--objective", default=d.objective, help=f"{', '.join(OBJECTIVES)} (default: %(default)s)")
    evaluate.add_argument("--max-length", type=int, default=2048, help="tokens of an input (default: %(default)s)")
    evaluate.add_argument(
        "--max-new-tokens", type=int, default=d.max_new_tokens, help="of a generated answer at most (default: %(default)s)"
    )
    evaluate.add_argument("--batch-size", type=int, default=d.batch_size, help="inputs at once (default: %(default)s)")
    evaluate.add_argument("--dtype", default=d.dtype, help=f"{', '.join(DTYPES)} (default: %(default)s)")
    evaluate.add_argument("--device", default=d.device, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    evaluate.add_argument("--threads", type=int, help="on the CPU (default: torch's; one for the embedded model)")
    evaluate.add_argument("--seed", type=int, default=d.seed, help="of the draws of examples (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")
    evaluate.add_argument("--quiet", action="store_true", help="nothing on stderr")


def _evaluate(args: argparse.Namespace, command: str) -> int:
    import dataclasses

    from ..hf.settings import Settings

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Settings) if hasattr(args, f.name)}
    return _print_evaluation(Settings(**given), args.checkpoint, args, command)


def _print_evaluation(settings: Any, checkpoint: str | None, args: argparse.Namespace, command: str) -> int:
    from ..hf.evaluate import evaluate, table
    from ..hf.loop.records import to_json

    result = evaluate(settings, checkpoint=checkpoint, command=command, quiet=args.quiet)
    print(to_json(result, indent=2) if args.json else table(result))
    return 0


def _add_reproduce(commands: Any) -> None:
    from ..hf.methods import METHODS
    from ..hf.papers.results import TABLES
    from ..hf.papers.scales import SCALES
    from ..hf.settings import DTYPES

    table = commands.add_parser("reproduce", help="a table of the papers, measured here beside the published numbers")
    table.set_defaults(run=_reproduce)
    table.add_argument("--table", required=True, help=", ".join(TABLES))
    table.add_argument("--scale", help=f"{', '.join(SCALES)} (default: paper with --model, otherwise small)")
    table.add_argument("--model", help="name on the Hub or a folder (default: a small one, as the scale says)")
    table.add_argument("--methods", type=_words, help=f"separated by commas, of {', '.join(METHODS)} (default: the table's)")
    table.add_argument("--tasks", type=_words, help="separated by commas (default: the table's; the embedded one without a model)")
    table.add_argument("--data-dir", help="folder of TASK.train.jsonl and so on (default: the Hub)")
    table.add_argument("--grid", action="store_true", help="search the paper's grid by the score on dev examples")
    table.add_argument("--steps", type=int, help="of every run (default: the scale's)")
    table.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: float32; without backward float16 on a GPU at scale paper)")
    table.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    table.add_argument("--threads", type=int, help="on the CPU (default: torch's)")
    table.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    table.add_argument("--output", help="folder for results.json, table.md, runs and plots (default: runs/reproduce-TABLE)")
    table.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")
    table.add_argument("--quiet", action="store_true", help="no progress on stderr")

    runs = commands.add_parser("compare", help="runs of finetune side by side: a table and plots of curves, memory and time")
    runs.set_defaults(run=_compare)
    runs.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders that finetune wrote")
    runs.add_argument("--output", default="runs/compare", help="folder for curves.png and costs.png (default: %(default)s)")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _reproduce(args: argparse.Namespace, command: str) -> int:
    import dataclasses

    from ..hf.loop.records import to_json
    from ..hf.papers.reproduce import reproduce
    from ..hf.papers.scales import Request

    document, text = reproduce(Request(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Request)}), command)
    print(to_json(document, indent=2) if args.json else text)
    return 0


def _compare(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from ..hf.reports.plots import compare_runs

    text, files = compare_runs([Path(folder) for folder in args.runs], Path(args.output))
    print(text)
    print(f"saved: {', '.join(map(str, files))}")
    return 0


def _add_plan(commands: Any) -> None:
    from ..hf.planning.planning import DTYPES, METHODS

    planner = commands.add_parser("plan", help="memory and time of training a model, from its configuration alone")
    planner.set_defaults(run=_plan)
    planner.add_argument("--model", required=True, help="name on the Hub or a folder with config.json")
    planner.add_argument("--method", default="lozo", help=f"{', '.join(METHODS)} (default: %(default)s)")
    planner.add_argument("--rank", type=int, default=2, help="(default: %(default)s)")
    planner.add_argument("--interval", type=int, default=50, help="(default: %(default)s)")
    planner.add_argument("--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    planner.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    planner.add_argument("--sequence-length", type=int, default=256, help="(default: %(default)s)")
    planner.add_argument("--placement", default="auto", help="probe, inplace or auto (default: %(default)s)")
    planner.add_argument("--device-bandwidth", type=float, help="GB/s of the device that is meant (default: measured here)")
    planner.add_argument("--device-tflops", type=float, help="its matrix products, 1e12 operations per second, in --dtype")
    planner.add_argument("--json", action="store_true", help="print the plan as JSON")


def _plan(args: argparse.Namespace, command: str) -> int:
    from ..hf.loop.records import to_json
    from ..hf.planning.planning import plan, report

    names: tuple[str, ...] = ("method", "rank", "interval", "dtype", "batch_size", "sequence_length", "placement")
    names += ("device_bandwidth", "device_tflops")
    found = plan(args.model, **{name: getattr(args, name) for name in names})
    print(to_json(found.to_dict(), indent=2) if args.json else report(found))
    return 0


def _doctor(args: argparse.Namespace, command: str) -> int:
    from .doctor import main as doctor

    return doctor(as_json=args.json)


def _tune(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from ..bench.tune import run

    return run(Path(args.output) if args.output else None, args.seconds, command)


def _bench(argv: list[str]) -> int:
    from ..bench import main as bench

    return bench(argv)
