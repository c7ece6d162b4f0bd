"""Processes of one run on this machine, forked from a server that has imported torch already, and a model for them."""

import multiprocessing
import traceback

import torch
from torch import distributed, nn

from python_tests.machine import wait_until

EXAMPLES, TOKENS = 15, 7


class Model(nn.Module):
    """A model that gives an example the same loss in any batch, because it evaluates one after the other."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.up, self.norm = nn.Embedding(11, 6), nn.Linear(6, 9), nn.LayerNorm(9)
        self.experts = nn.Parameter(torch.randn(2, 9, 5) * 0.3)
        self.head = nn.Linear(5, 11, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        return torch.cat([self.together(row) for row in tokens.split(1)])

    def together(self, tokens):
        h = self.norm(torch.tanh(self.up(self.embed(tokens[:, :-1]))))
        h = torch.tanh(h @ self.experts[0]) + torch.tanh(h @ self.experts[1])
        return nn.functional.cross_entropy(self.head(h).float().transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


class Batched(Model):
    """The same model on whole batches, as it has to be where one forward pass serves several evaluations."""

    forward = Model.together


def batch(step):
    return torch.randint(0, 11, (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(step))


def start(ranks, folder, work, *arguments):
    """Starts processes that call ``work(rank, ranks, folder, *arguments)`` in a group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lozo_kernels"])
    started = []
    for rank in range(ranks):
        process = context.Process(target=_main, args=(rank, ranks, folder, work, arguments), daemon=True)
        process.start()
        started.append(process)
    return started


def finish(started, seconds=150.0):
    """Waits for processes; returns their exit codes, None for one that did not end."""
    try:
        wait_until(lambda: all(process.exitcode is not None for process in started), seconds)
        return [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()


def logs(folder):
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


def _main(rank, ranks, folder, work, arguments):
    torch.set_num_threads(1)
    name = f"{work.__name__}-{ranks}"
    try:
        store = distributed.FileStore(str(folder / f"{name}.store"), ranks)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        work(rank, ranks, folder, *arguments)
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{name}-{rank}.log").write_text(traceback.format_exc())
        raise
