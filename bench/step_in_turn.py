"""Times steps of the OPT-125m architecture whenever a line arrives on stdin; ``bench/overhead.py`` runs it on two checkouts.

Each line is the name of a placement, and is answered with the milliseconds of its next step. It uses only what both checkouts have.
"""

import sys
import time

import torch
from transformers import OPTConfig, OPTForCausalLM

from lozo_kernels import LOZO

TOKENS = 16
PLACEMENTS = {"in place": {}, "in place, fused": {"fuse_steps": True}, "probe": {"placement": "probe"}}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = OPTForCausalLM(OPTConfig()).eval()  # the defaults are those of OPT-125m
    tokens = torch.randint(5, 50_000, (1, TOKENS))
    optimizer, current = None, None
    for line in sys.stdin:
        name = line.strip()
        if name != current:
            if optimizer is not None:
                optimizer.handle.restore()
            optimizer, current = LOZO(model, lr=1e-7, interval=10_000, **PLACEMENTS[name]), name
            for _ in range(3):
                optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
        start = time.perf_counter()
        optimizer.step(lambda: model(input_ids=tokens, labels=tokens).loss)
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
