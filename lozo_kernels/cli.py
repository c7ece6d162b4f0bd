"""The command ``lozo-kernels``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__
from .errors import InputError

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
    from .hf.settings import DTYPES, SCHEDULES, Settings
    from .hf.settings import OBJECTIVES as objectives

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
    data.add_argument("--data-dir", help="folder of TASK.train.jsonl and TASK.dev.jsonl (default: the Hub)")
    data.add_argument("--objective", default=d.objective, help=f"{', '.join(objectives)} (default: %(default)s)")
    data.add_argument("--max-length", type=int, default=d.max_length, help="tokens per example (default: %(default)s)")

    method = finetune.add_argument_group("method")
    method.add_argument("--method", default=d.method, help="lozo, lozo-m, mezo or mezo-m (default: %(default)s)")
    method.add_argument("--rank", type=int, default=d.rank, help="columns of U and V (default: %(default)s)")
    method.add_argument("--interval", type=int, default=d.interval, help="steps between two draws of V (default: %(default)s)")
    method.add_argument("--eps", type=float, default=d.eps, help="scale of the perturbation (default: %(default)s)")
    method.add_argument("--lr", type=float, help="learning rate (default: 1e-6; tuned values for the embedded model)")
    method.add_argument("--lr-schedule", default=d.lr_schedule, help=f"{', '.join(SCHEDULES)} (default: %(default)s)")
    method.add_argument("--momentum", type=float, help="beta of lozo-m and mezo-m (default: 0.9)")
    method.add_argument("--weight-decay", type=float, default=d.weight_decay, help="decoupled (default: %(default)s)")
    method.add_argument("--scaling", default=d.scaling, help="where 1/rank goes: paper, card or published (default: %(default)s)")
    method.add_argument("--directions", type=int, default=d.directions, help="directions per step (default: %(default)s)")
    method.add_argument(
        "--placement", default=d.placement, help="inplace moves the weights, probe only reads them, or auto (default: %(default)s)"
    )

    run = finetune.add_argument_group("run")
    run.add_argument("--steps", type=int, help="(default: 1000; 1500 without arguments)")
    run.add_argument("--batch-size", type=int, default=d.batch_size, help="(default: %(default)s)")
    run.add_argument("--eval-every", type=int, help="steps between evaluations (default: a tenth of the run)")
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
    run.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else, on stdout")
    run.add_argument("--quiet", action="store_true", help="no progress on stderr")

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

    from .hf.finetune import finetune
    from .hf.records import to_json
    from .hf.report import table
    from .hf.settings import Settings

    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    summary = finetune(settings, command=command, quiet=args.quiet)
    print(to_json(summary, indent=2) if args.json else table(summary))
    if summary["stopped"] is None:
        return 0
    print(
        f"lozo-kernels finetune: stopped after {summary['steps_done']} of {summary['settings']['steps']} steps: "
        f"{summary['stopped']}; what there is was saved in {summary['output']}",
        file=sys.stderr,
    )
    return EXIT_INTERRUPTED if summary["stopped"] == "interrupted" else EXIT_FAILED


def _doctor(args: argparse.Namespace, command: str) -> int:
    from .doctor import main as doctor

    return doctor(as_json=args.json)


def _tune(args: argparse.Namespace, command: str) -> int:
    from pathlib import Path

    from .tune import run

    return run(Path(args.output) if args.output else None, args.seconds, command)


def _bench(argv: list[str]) -> int:
    from .bench import main as bench

    return bench(argv)
