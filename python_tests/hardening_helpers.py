"""Short runs of every kind, with a journal, for tests that disturb them."""

import copy

import torch

from lozo_kernels import LOZO, MeZO, SubZero
from lozo_kernels.journal import Journal, replay
from python_tests.models import Zoo, same, weights, zoo_loss

STEPS = 6
KINDS = {
    "in place": (LOZO, torch.bfloat16, {}),
    "fused, momentum": (LOZO, torch.float32, {"fuse_steps": True, "momentum": 0.9}),
    "scratch, momentum": (LOZO, torch.float32, {"placement": "probe", "side": "scratch", "momentum": 0.9}),
    "activation": (LOZO, torch.bfloat16, {"placement": "probe", "side": "activation"}),
    "copy": (LOZO, torch.bfloat16, {"placement": "probe", "side": "copy", "weight_decay": 0.1}),
    "mezo": (MeZO, torch.float32, {"momentum": 0.5, "directions": 2}),
    "subzero": (SubZero, torch.float32, {"placement": "probe", "side": "scratch"}),
}


def leaves_rounding(kind):
    """Whether evaluations move weights there and back, so that a step that is tried again starts from others."""
    return "placement" not in KINDS[kind][2]


def zoo_of(kind, seed=0):
    torch.manual_seed(seed)
    return Zoo().to(KINDS[kind][1])


def begun(kind, path, model, **more):
    """Begins a run with a journal; returns a copy of the model before it, and the optimiser."""
    method, _, options = KINDS[kind]
    base = copy.deepcopy(model)
    optimizer = method(model, lr=1e-2, eps=1e-2, interval=4, **options, **more)
    Journal.create(path, optimizer, overwrite=True)
    return base, optimizer


def take_steps(model, optimizer, upto=STEPS):
    while optimizer.steps_done < upto:
        optimizer.step(zoo_loss(model, optimizer.steps_done))


def finished(model, optimizer):
    optimizer.journal.finish()
    optimizer.handle.restore()
    return weights(model)


def calm(kind, path, seed=0, **more):
    """Returns the weights at the end of a run that nothing disturbs."""
    model = zoo_of(kind, seed)
    _, optimizer = begun(kind, path, model, **more)
    take_steps(model, optimizer)
    return finished(model, optimizer)


def check_replay(base, path, expected, backend=None):
    """Checks that the journal leads from the base to the weights at the end of the run, in every bit."""
    assert replay(base, path, backend=backend).agrees is True
    assert same(weights(base), expected)
