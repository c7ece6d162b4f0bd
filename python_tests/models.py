"""Small models with every kind of parameter that the engine meets."""

import torch
from torch import nn


class Zoo(nn.Module):
    """Linear layers, a tied embedding and head, a norm, convolutions, stacked experts, a scalar, a frozen tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.experts = nn.Parameter(torch.randn(3, 6, 5) * 0.3)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.up = nn.Linear(5, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    def forward(self, tokens):
        h = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        h = torch.einsum("btd,edf->btf", self.norm(h), self.experts) * self.gain
        return self.head(self.up(torch.tanh(h)) @ self.frozen)


def zoo_loss(model, seed=0):
    """Makes a closure: the cross-entropy of the next tokens of a fixed batch."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (4, 9), generator=generator)

    def loss():
        logits = model(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def losses_of(model):
    """Makes a closure that takes tokens and returns a loss for each example: that of its next tokens."""

    def losses(tokens):
        logits = model(tokens[:, :-1]).float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    return losses


def full(p):
    """Copies the whole of a parameter that may be sharded."""
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


def weights(model):
    """The weights as they are stored; ``model.named_parameters()`` would bring them up to date first."""
    found = ((f"{path}.{key}" if path else key, p) for path, m in model.named_modules() for key, p in m._parameters.items())
    return {name: p.detach().clone() for name, p in found if p is not None}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
