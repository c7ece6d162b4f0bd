"""A zeroth-order trainer of your own on a PerturbationBackend: a direction is a seed, a step is a seed and a number.
Run: python examples/own_trainer_backend.py [steps]; it needs no network, its model is random."""

import sys

import torch
from torch import nn

from lozo_kernels.adapters import DirectionBackend, PerturbationBackend

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 1))
inputs = torch.randn(256, 20)
targets = inputs[:, :1] * inputs[:, 1:2]


class Trainer:
    """SPSA with a log from which every step can be replayed, or taken back."""

    def __init__(self, weights: PerturbationBackend, eps: float, lr: float):
        self.weights, self.eps, self.lr, self.log = weights, eps, lr, []

    @torch.no_grad()
    def step(self, loss, seed: int) -> float:
        """One direction."""
        self.weights.perturb(seed, self.eps)
        plus = float(loss())
        self.weights.perturb(seed, -2 * self.eps)
        minus = float(loss())
        self.weights.perturb(seed, self.eps)
        self.log.append((seed, (plus - minus) / (2 * self.eps)))
        self.weights.update([seed], [self.log[-1][1]], self.lr)
        return (plus + minus) / 2


trainer = Trainer(DirectionBackend(model, estimator="lowrank", rank=4), eps=1e-3, lr=5e-3)
losses = [trainer.step(lambda: nn.functional.mse_loss(model(inputs), targets), seed=s) for s in range(steps)]
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; the run is {len(trainer.log)} pairs of a seed and a number")
