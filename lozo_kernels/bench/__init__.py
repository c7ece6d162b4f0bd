"""``lozo-kernels bench``: this library measured beside what it replaces, on any machine that it is installed on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..kernels.registry import choose_backend
from . import correctness, exactness, fits, host, memory, perturb, step
from .arguments import Parser, add_common, check_output
from .document import publish, where
from .environment import OtherLoad
from .gate import GateError

_MEASUREMENTS = {
    "perturb": (perturb, "one pass over the weights, beside the floor, addmm_ and the published expressions"),
    "step": (step, "whole steps of a real architecture, beside their two forward passes and the published step"),
    "memory": (memory, "memory of a step beyond that of its forward passes"),
    "fits": (fits, "whether a model and a step on it fit into a device"),
    "host": (host, "what a pass over a model costs in Python, with its kernel launches left out"),
    "correctness": (correctness, "the bits of every op on a device beside those on the CPU"),
    "exactness": (exactness, "whether U V^T is exact: on matrix units in fp16 with fp32 sums, and in the kernels"),
}


def main(argv: Sequence[str]) -> int:
    """Runs a measurement.

    Args:
        argv: the words after ``lozo-kernels bench``.

    Returns:
        0; 1 if an op disagrees with its reference, and then no figures are shown; 2 for a wrong command line; 130 after Ctrl-C.
    """
    name = argv[0] if argv and argv[0] in _MEASUREMENTS else ""
    try:
        options = _parser().parse_args(argv)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.device.type == "cuda":
            torch.cuda.set_device(options.device)
        _check_backend(options.device)
        check_output(options.output)
        return _run(_MEASUREMENTS[options.measurement][0], options, argv)
    except InputError as e:
        message, code = f"error: {e}", 2
    except GateError as e:
        message, code = f"no figures, because an op is wrong: {e}", 1
    except KeyboardInterrupt:
        message, code = "interrupted; no figures", 130
    print(f"{f'lozo-kernels bench {name}'.rstrip()}: {message}", file=sys.stderr)
    return code


def _run(module: Any, options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Makes a measurement, prints it and writes its document. The measurement gets the document at its start and may add to it."""
    document = where(options.device, argv)
    others = OtherLoad()
    found = module.measure(options, document)
    document |= {"cpus_used_by_others": others.mean()} | found
    publish(document, module.render, as_json=options.json, output=options.output)
    return 1 if hasattr(module, "failed") and module.failed(document) else 0


def _check_backend(device: torch.device) -> None:
    """Raises InputError if LOZO_KERNELS_BACKEND names one that cannot serve the device."""
    try:
        choose_backend(device)
    except (ValueError, RuntimeError) as e:
        raise InputError(str(e)) from None


def _parser() -> Parser:
    parser = Parser(prog="lozo-kernels bench", description=__doc__)
    commands = parser.add_subparsers(dest="measurement", required=True, metavar="{" + ",".join(_MEASUREMENTS) + "}")
    for name, (module, text) in _MEASUREMENTS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_common(command)
        module.add_arguments(command)
    return parser
