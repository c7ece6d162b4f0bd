"""Federated fine-tuning: two clients with data of their own exchange a seed and a number a step, and stay equal bit for bit.
Run: python examples/federated.py [steps]; it needs no network, its model is random."""

import copy
import sys

import torch
from torch import nn

from lozo_kernels.adapters import DirectionBackend

steps, eps, lr = int(sys.argv[1]) if len(sys.argv) > 1 else 300, 1e-3, 2e-2
torch.manual_seed(0)
teacher = nn.Linear(16, 3)
trial = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
clients = [copy.deepcopy(trial) for _ in range(2)]
data = [torch.randn(128, 16) for _ in clients]  # they stay where they are
weights = [DirectionBackend(model) for model in clients]
trial_weights = DirectionBackend(trial)


@torch.no_grad()
def message(client: int, seed: int) -> tuple[int, float]:
    """All that a client sends: a seed, and how much its loss rises along that direction."""
    rise, labels = 0.0, teacher(data[client]).argmax(-1)
    for side in (1, -1):  # on a copy: a perturbation that is taken back leaves rounding behind
        trial.load_state_dict(clients[client].state_dict())
        trial_weights.perturb(seed, side * eps)
        rise += side * float(nn.functional.cross_entropy(trial(data[client]), labels))
    return seed, rise / (2 * eps)


for step in range(steps):
    seeds, numbers = zip(*(message(i, seed=2 * step + i) for i in range(2)), strict=True)
    for own in weights:  # everyone applies everyone's message
        own.update(seeds, [c / 2 for c in numbers], lr)
assert all(map(torch.equal, clients[0].parameters(), clients[1].parameters()))
right = [(model(x).argmax(-1) == teacher(x).argmax(-1)).float().mean() for model, x in zip(clients, data, strict=True)]
print(f"accuracy of the clients: {float(sum(right)) / 2:.0%}")
