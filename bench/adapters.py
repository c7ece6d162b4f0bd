"""What is saved where this library serves other trainers: the weight passes of their steps, as published and with its kernels.

``python -m bench.adapters`` writes ``bench/results/adapters_cpu.json``. The trainers are the miniatures of ``python_tests``, which
make the published passes one torch expression after the other, on a model of the architecture of OPT-125M. Forward passes are left
out: what is timed is all that a step does to the weights, three perturbations and an update.
"""

import copy
import itertools
import sys

import torch

from bench.evidence import CPU, made_by, result_parser, write_result
from lozo_kernels.adapters import accelerate_trainer
from lozo_kernels.bench.document import heading, progress, save_partial
from lozo_kernels.bench.environment import OtherLoad
from lozo_kernels.bench.models import build_model
from lozo_kernels.bench.timing import Contender, interleave, median, paired_ratio, spread
from lozo_kernels.model.text_table import text_table
from python_tests.allocations import LargestNew
from python_tests.miniatures import LozoLarge, LozoMedium, MezoLarge, MezoMedium, SubZeroMini
from python_tests.miniatures_with_steps import Zo2Mini, ZoLlmMini

TRAINERS = {
    "MeZO large": (MezoLarge, {}),
    "MeZO medium": (MezoMedium, {}),
    "LOZO large": (LozoLarge, {"rank_r": 2, "step_interval": 50}),
    "LOZO medium, momentum": (LozoMedium, {"rank": 4, "step_interval": 50, "beta1": 0.9}),
    "SubZero": (SubZeroMini, {"gauss_rank": 8, "update_interval": 1000}),
    "ZO-LLM": (ZoLlmMini, {}),
    "zo2, whole model": (Zo2Mini, {}),
}
SERVED = {"served": None, "served, compat='published'": "published"}


def trainer_of(kind, options, model):
    """Makes a trainer whose losses are given and whose forward passes do nothing."""

    class Unseeing(kind):
        def see(self, model):
            pass

    size = {"lr": 1e-6} if kind is Zo2Mini else {"learning_rate": 1e-6, "zo_eps": 1e-3}
    return Unseeing(model, itertools.cycle((0.7, 0.6)), **options, **size)


def measure(name, model, rounds):
    """Measures one row: medians of a step's weight passes, ratios within rounds, and the largest tensor that a step makes."""
    kind, options = TRAINERS[name]
    trainers = {"published": trainer_of(kind, options, copy.deepcopy(model))}
    for served, compat in SERVED.items():
        trainers[served] = trainer_of(kind, options, copy.deepcopy(model))
        accelerate_trainer(trainers[served], compat=compat)
    row = {"trainer": name, "kind": kind.__name__, "options": options}
    largest = {}
    for who, trainer in trainers.items():
        trainer.run(1)  # V and subspaces are drawn, tables made
        with LargestNew() as new:
            trainer.run(1)
        largest[who] = new.bytes
    contenders = {who: Contender(lambda t=t: t.run(1), warm_up=False) for who, t in trainers.items()}
    seconds = interleave(contenders, rounds)
    row["ms"] = {who: round(1e3 * median(s.values()), 1) for who, s in seconds.items()}
    row["speedup"] = {who: round(paired_ratio(seconds["published"], seconds[who]), 2) for who in SERVED}
    row["largest_new_tensor_bytes"] = largest
    row["spread_seconds"] = {who: spread(s) for who, s in seconds.items()}
    return row


def render(document):
    """Formats the rows as text."""
    header = (
        "trainer",
        "published ms",
        "served ms",
        "faster",
        "compat ms",
        "faster",
        "largest new tensor: published",
        "served",
        "compat",
    )
    lines = []
    for r in document["rows"]:
        ms, new = list(r["ms"].values()), [f"{b / 1e6:.3f} MB" for b in r["largest_new_tensor_bytes"].values()]
        faster = [f"{x:.1f}x" for x in r["speedup"].values()]
        lines.append((r["trainer"], f"{ms[0]}", f"{ms[1]}", faster[0], f"{ms[2]}", faster[1], *new))
    return text_table([header, *lines])


def main(argv=None):
    parser = result_parser(__doc__, "adapters_cpu.json")
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    others = OtherLoad()
    document = made_by("bench.adapters", argv)
    model = build_model(options.model, getattr(torch, options.dtype), CPU)
    parameters = sum(p.numel() for p in model.parameters())
    document |= {
        "model": options.model,
        "parameters": parameters,
        "largest_weight_bytes": max(p.nbytes for p in model.parameters()),
        "dtype": options.dtype,
        "rounds": options.rounds,
        "what": "the weight passes of a step (three perturbations and an update), forward passes left out; medians, and medians of "
        "ratios within a round",
        "machine": "shared with other processes during the measurement: see cpus_used_by_others; ratios are steadier than times",
    }
    rows = []
    for name in TRAINERS:
        progress(name)
        rows.append(measure(name, model, options.rounds))
        save_partial(document, str(options.output), rows=rows)
    document |= {"cpus_used_by_others": others.mean(), "rows": rows}
    write_result(document, options.output)
    print(f"{heading(document)}\n\n{render(document)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
