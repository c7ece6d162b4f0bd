"""The predicted step time of runs on many GPUs, and the same model of a step compared with runs of several processes here.

``python -m bench.scale`` writes ``bench/results/scale_cpu.json``: how long the parts of a step take on this machine in 1 to 5
processes, the step that follows from them, the step that was measured, what was exchanged, how many bytes the journal has, and
OPT-175B and a mixture of experts with 1e12 parameters on 8 to 4,096 GPUs under the assumptions of ``docs/scale.md``. Exit status 1
if a prediction is more than a fifth off.
"""

import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, nn

from bench.evidence import made_by, result_parser, write_result
from lozo_kernels import LOZO
from lozo_kernels.bench.environment import OtherLoad
from lozo_kernels.journal import Journal
from lozo_kernels.optim.parallel.channel import Channel

TOLERANCE = 0.2
PROCESSES = (1, 2, 3, 5)
HIDDEN, LAYERS, EXAMPLES, TOKENS = 384, 4, 30, 24
ROUNDS, EVALUATIONS, PASSES, EXCHANGES, STEPS = 9, 2, 3, 10, 3


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a step is made of, in seconds, when so many processes run together; bandwidth in bytes read and written a second."""

    forward: float
    bandwidth: float
    exchange: float
    fixed: float


def step_seconds(parts: Parts, weight_bytes: float, forwards: float, passes: float) -> float:
    """Predicts a step: forward passes, passes over the weights, one exchange, and what does not depend on the model."""
    return forwards * parts.forward + passes * 2 * weight_bytes / parts.bandwidth + parts.exchange + parts.fixed


# ---- here ----


class Model(nn.Module):
    def __init__(self, hidden=HIDDEN, layers=LAYERS):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
            for _ in range(layers)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean((1, 2))


def timed(work, times):
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


@torch.no_grad()
def measure(rank, ranks, folder):
    """Times parts and steps in turns, so that both see the same machine. Every block ends when the last process has finished."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(folder / f"store-{ranks}"), ranks), rank=rank, world_size=ranks
    )
    torch.manual_seed(0)
    settings = {"lr": 1e-6, "interval": 50, "parallel": "examples"}
    model, nothing = Model(), Model(8, 1)
    optimizer, light = LOZO(model, **settings), LOZO(nothing, **settings)
    channel, handle = Channel(None, timeout=300.0), optimizer.handle
    x = torch.randn(EXAMPLES, TOKENS, HIDDEN).chunk(ranks)[rank]
    words = torch.zeros(7, dtype=torch.int64)
    zero = torch.zeros(len(x))

    def answer(rows):
        return rows[0].narrow(0, 0, 4)

    def exchange():
        channel.exchange(words, 4, answer)

    def together(work, times):
        def block():
            for _ in range(times):
                work()
            exchange()

        return timed(block, 1)

    found = {"exchange": [], "forward": [], "pass": [], "fixed": [], "step": []}
    for step in range(ROUNDS + 1):
        row = {"exchange": timed(exchange, EXCHANGES)}
        # The forwards of one step wait for the slowest process, as those of a step do.
        row["forward"] = timed(lambda: together(lambda: model(x), EVALUATIONS), STEPS)
        row["forward"] = max(0.0, row["forward"] - row["exchange"]) / EVALUATIONS
        scales = iter((1e-3, -2e-3, 1e-3) * STEPS)
        row["pass"] = max(0.0, together(lambda s=scales, t=step: handle.perturb_(t, next(s)), PASSES * STEPS) - row["exchange"])
        row["pass"] /= PASSES * STEPS
        # A step of a model of no size: what Python, the ops and the comparison of scalars cost, with one exchange.
        row["fixed"] = max(0.0, timed(lambda: light.step(lambda rows: zero[: len(rows)], zero), STEPS) - row["exchange"])
        row["step"] = timed(lambda: optimizer.step(model, x), STEPS)
        if step:  # the first round warms up
            for key, value in row.items():
                found[key].append(value)
    traffic = optimizer.parallel.traffic
    found |= {"bytes": traffic.sent + traffic.received, "weight_bytes": sum(p.nbytes for p in model.parameters())}
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def check(ranks, folder):
    """Compares predicted and measured steps of so many processes here."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=measure, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
        if process.exitcode != 0:
            raise SystemExit(f"a process of {ranks} failed ({process.exitcode})")
    every = [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    size = every[0]["weight_bytes"]

    def middle(key):
        """Returns the median over rounds of the slowest process of each."""
        return statistics.median(max(one[key][i] for one in every) for i in range(ROUNDS))

    parts = Parts(middle("forward"), 2 * size / middle("pass"), middle("exchange"), middle("fixed"))
    predicted, measured = step_seconds(parts, size, 2, PASSES), middle("step")
    return {
        "processes": ranks,
        **{f"{key}_seconds": getattr(parts, key) for key in ("forward", "exchange", "fixed")},
        "weight_pass_bytes_per_second": parts.bandwidth,
        "predicted_step_seconds": predicted,
        "measured_step_seconds": measured,
        "error": predicted / measured - 1,
        "exchanged_bytes_per_step_first_rank": every[0]["bytes"],
        "exchanged_bytes_per_step_other_ranks": every[-1]["bytes"],
    }


def journal_bytes(steps=200, directions=1):
    """Returns the bytes of the header of a small model, and of each step, in a journal with a constant learning rate."""
    model = Model(8, 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.journal"
        optimizer = LOZO(model, lr=1e-6, directions=directions)
        Journal.create(path, optimizer)
        for step in range(steps):
            optimizer.step(lambda: model(torch.ones(1, 2, 8)).sum())
            if step == 0:
                first = path.stat().st_size
        last = path.stat().st_size
    return first, (last - first) / (steps - 1)


# ---- at scale: assumptions, with their sources in docs/scale.md ----


@dataclasses.dataclass(frozen=True)
class Cluster:
    """GPUs of 80 GB, eight in a node. Rates are a GPU's, bytes and floating-point operations a second, what software reaches of
    them is in ``efficiency``; seconds of a message between two hosts, and of taking in or giving out one at the first rank."""

    node: int = 8
    memory: float = 80e9
    bandwidth: float = 3.35e12
    flops: float = 989e12
    nvlink: float = 450e9
    network: float = 50e9
    efficiency: float = 0.5
    latency: float = 50e-6
    message: float = 10e-6
    fixed: float = 3e-3
    jitter: float = 0.02


@dataclasses.dataclass(frozen=True)
class Large:
    """A model in bf16. ``dispatched``: bytes that leave and reach a GPU for each of its tokens, in all layers."""

    name: str
    parameters: float
    active: float
    replica: int
    sharding: str
    dispatched: float = 0.0


MODELS = (
    Large("OPT-175B, weights sharded in each node", 175e9, 175e9, 8, "gathered for each forward"),
    Large("OPT-175B, weights sharded over all nodes", 175e9, 175e9, 0, "gathered for each forward"),
    Large("1T mixture of experts (32B active), experts spread over 8 nodes", 1e12, 32e9, 64, "experts stay", 61 * 2 * 8 * 7168 * 2),
)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS_PER_GPU = 16 * 256


def forward_seconds(model, cluster, gpus):
    """Predicts a forward pass of the tokens of each GPU. Weights or tokens travel while others are computed with."""
    replica = model.replica or gpus
    compute = 2 * model.active * TOKENS_PER_GPU / (cluster.flops * cluster.efficiency)
    share = 2 * model.parameters / replica
    link = cluster.nvlink if replica <= cluster.node else cluster.network
    if model.sharding == "experts stay":
        moving = model.dispatched * TOKENS_PER_GPU / (link * cluster.efficiency)
        return max(compute, share / cluster.bandwidth) + moving  # a layer waits for its tokens
    moving = 2 * model.parameters * (1 - 1 / replica) / (link * cluster.efficiency)
    return max(compute, moving)


def at_scale(model, cluster, gpus, directions=1, steps=400):
    """Simulates a two-sided step in place on so many GPUs, each forward pass of each GPU a little faster or slower."""
    replica = model.replica or gpus
    share = 2 * model.parameters / replica
    if gpus < replica or share > 0.8 * cluster.memory:
        return None
    parts = Parts(
        forward_seconds(model, cluster, gpus),
        cluster.bandwidth * 0.8,
        2 * cluster.latency + 2 * (gpus - 1) * cluster.message,
        cluster.fixed,
    )
    even = step_seconds(parts, share, 2 * directions, PASSES)
    generator = torch.Generator().manual_seed(gpus)
    slowest = torch.stack([torch.randn(gpus, generator=generator).max() for _ in range(steps)])
    waiting = 2 * directions * parts.forward * cluster.jitter * float(slowest.clamp(min=0).mean()) / (2 * directions) ** 0.5
    seconds = even + waiting
    payload = 8 * (3 + 4 * directions) + 8 * (4 + 2 * directions)
    return {
        "gpus": gpus,
        "ranks_with_the_same_weights": gpus // replica,
        "weight_bytes_per_gpu": share,
        "forward_seconds": parts.forward,
        "weight_passes_seconds": PASSES * 2 * share / parts.bandwidth,
        "exchange_seconds": parts.exchange,
        "waiting_for_the_slowest_seconds": waiting,
        "step_seconds": seconds,
        "tokens_per_second": gpus * TOKENS_PER_GPU / seconds,
        "exchange_share": parts.exchange / seconds,
        "exchanged_bytes_per_step_and_rank": payload,
        "gradient_bytes_that_backpropagation_would_exchange": 2 * 2 * model.parameters,
    }


def main():
    parser = result_parser(__doc__, "scale_cpu.json")
    parser.add_argument("--no-runs", action="store_true", help="only what needs no measurement, printed")
    args = parser.parse_args()
    cluster = Cluster()
    large = [{"model": m.name, "rows": [r for g in GPUS if (r := at_scale(m, cluster, g)) is not None]} for m in MODELS]
    for found in large:
        print(found["model"])
        for row in found["rows"]:
            print(
                f"{row['gpus']:6d} GPUs  step {row['step_seconds']:7.3f} s  {row['tokens_per_second']:12.0f} tokens/s  "
                f"exchange {row['exchange_share']:6.2%}"
            )
    if args.no_runs:
        return
    torch.set_num_threads(1)
    document = made_by("bench.scale", sys.argv[1:])
    load, here = OtherLoad(), []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in PROCESSES:
            here.append(check(ranks, Path(folder)))
            row = here[-1]
            print(
                f"{ranks} processes: {1e3 * row['predicted_step_seconds']:.1f} ms predicted, "
                f"{1e3 * row['measured_step_seconds']:.1f} measured ({row['error']:+.1%})"
            )
    header, per_step = journal_bytes()
    document |= {
        "other_load_cpus": load.mean(),
        "tolerance": TOLERANCE,
        "processes": here,
        "journal": {
            "header_and_first_step_bytes": header,
            "bytes_per_step": per_step,
            "bytes_of_20000_steps": header + 19999 * per_step,
        },
        "assumptions": dataclasses.asdict(cluster) | {"tokens_per_gpu": TOKENS_PER_GPU},
        "large": large,
    }
    write_result(document, args.output)
    print(f"journal: {per_step:.1f} bytes a step; saved {args.output}")
    if any(abs(row["error"]) > TOLERANCE for row in here):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
