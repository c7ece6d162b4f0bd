"""What holds wherever each part of a batch has a direction of its own."""

import torch
from torch import nn


def check_the_mean_loss(model, optimizer, tokens_of, places):
    """The mean of the two parts' losses is the loss of the batch, whatever its examples weigh, and however many batches there are.

    Args:
        optimizer: of the model, with two parts; tokens_of: makes so many examples, whose losses are at so many places.
    """
    mask = torch.rand(2, 4, places) < 0.6
    mask[:, 0] = True

    def masked(batch):
        tokens, keep = batch
        each = nn.functional.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        return (each * keep).sum(1), keep.sum(1)

    batches = [(tokens_of(4), keep) for keep in mask]
    with torch.no_grad():
        expected = sum(s.sum() / w.sum() for s, w in map(masked, batches)) / 2
    optimizer.step([masked, masked], batches)
    assert optimizer.info.loss_plus.shape == (2,)
    assert torch.allclose(optimizer.info.loss.float(), expected, rtol=1e-5)


def check_the_mean_estimate(kind, rng, **options):
    """The mean of estimates is the gradient. The bound is a standard error, of which the worst of 24 means is not five and a half
    times off."""
    model, parts, samples = nn.Linear(5, 4), 4, 250
    x, y = torch.randn(8, 5), torch.randn(8, 4)

    def losses(batch):
        return (torch.tanh(model(batch[0])) - batch[1]).square().mean(1)

    losses((x, y)).mean().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters()}
    optimizer = kind(model, lr=0.0, eps=1e-3, rank=2, interval=1, directions=parts, seed=rng.getrandbits(64), **options)
    found = {name: [] for name in gradients}
    for step in range(samples):
        optimizer.step(losses, (x, y))
        for name, g in gradients.items():
            z = [optimizer.handle.materialize(name, step, direction=i).double() for i in range(parts)]
            mean = sum(c * one for c, one in zip(optimizer.info.c, z, strict=True)) / parts
            found[name].append(mean / (1 if g.dim() == 1 else 2))
    away = {name: torch.stack(found[name]).mean(0) - g for name, g in gradients.items()}
    for name, off in away.items():
        assert (off.abs() <= 5.5 * torch.stack(found[name]).std(0) / samples**0.5 + 1e-4).all(), name
    squares = [sum(t.square().sum() for t in some.values()) for some in (away, gradients)]
    assert squares[0] < squares[1]  # so few say something
