"""``lozo-kernels bench``: this library measured beside what it replaces, on any machine that it is installed on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from ..kernels.registry import choose_backend
from ..model.files import file_trouble
from . import correctness, memory, perturb, step
from .arguments import Parser, add_common, check_output
from .deadline import EXIT_INCOMPLETE
from .document import publish, where
from .environment import PROGRAM, OtherLoad
from .gate import GateError

Measurements = Mapping[str, tuple[Any, str]]
"""The module of each measurement, and what it measures in a few words."""

MEASUREMENTS: Measurements = {
    "perturb": (perturb, "one pass over the weights, beside the floor, addmm_ and the published expressions"),
    "step": (step, "whole steps of a real architecture, beside their two forward passes and the published step"),
    "memory": (memory, "memory of a step beyond that of its forward passes"),
    "correctness": (correctness, "the bits of every op on a device beside those on the CPU"),
}


def main(argv: Sequence[str], measurements: Measurements = MEASUREMENTS, program: Sequence[str] = PROGRAM) -> int:
    """Runs a measurement.

    Args:
        argv: the words after those of the program.

    Returns:
        0; 1 if an op disagrees with its reference, and then no figures are shown; 2 for a wrong command line; 3 if the time that
        ``--seconds`` gives was over before all was measured; 130 after Ctrl-C.
    """
    name = argv[0] if argv and argv[0] in measurements else ""
    try:
        options = _parser(measurements, program).parse_args(argv)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
        _check_backend(options.device)
        check_output(options.output)
        return _run(measurements[options.measurement][0], options, argv, program)
    except InputError as e:
        message, code = f"error: {e}", 2
    except OSError as e:
        message, code = f"error: {file_trouble(e)}", 1
    except GateError as e:
        message, code = f"no figures, because an op is wrong: {e}", 1
    except KeyboardInterrupt:
        message, code = "interrupted; no figures", 130
    print(f"{' '.join([*program, name]).rstrip()}: {message}", file=sys.stderr)
    return code


def _run(module: Any, options: argparse.Namespace, argv: Sequence[str], program: Sequence[str]) -> int:
    """Makes a measurement, prints it and writes its document. The measurement gets the document at its start and may add to it."""
    document = where(options.device, argv, program)
    others = OtherLoad()
    found = module.measure(options, document)
    document |= {"cpus_used_by_others": others.mean()} | found
    publish(document, module.render, as_json=options.json, output=options.output)
    if hasattr(module, "failed") and module.failed(document):
        return 1
    return 0 if document.get("complete", True) else EXIT_INCOMPLETE


def _check_backend(device: torch.device) -> None:
    """Raises InputError if LOZO_KERNELS_BACKEND names one that cannot serve the device."""
    try:
        choose_backend(device)
    except (ValueError, RuntimeError) as e:
        raise InputError(str(e)) from None


def _parser(measurements: Measurements, program: Sequence[str]) -> Parser:
    parser = Parser(prog=" ".join(program), description=__doc__)
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="{" + ",".join(measurements) + "}")
    for name, (module, text) in measurements.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_common(command)
        module.add_arguments(command)
    return parser
