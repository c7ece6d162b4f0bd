"""Short runs with a journal, on a model of every kind of parameter."""

import contextlib
import copy

import torch

from lozo_kernels import LOZO
from lozo_kernels.journal import Journal
from python_tests.models import Zoo, zoo_loss


def zoo(dtype=torch.bfloat16):
    return Zoo().to(dtype)


def recorded(path, model, steps=9, optimizer=LOZO, lr=1e-2, odd=False, **options):
    """Records a run. If ``odd``, it has an evaluation, a call of state_dict(), a closure that fails and a loss of NaN in between.

    Returns:
        (base, trained): copies of the model before and after.
    """
    base = copy.deepcopy(model)
    made = optimizer(model, lr=lr, eps=1e-2, interval=4, **options)
    loss = zoo_loss(model)
    calls = []

    def fails():
        calls.append(loss())
        if len(calls) == 2:
            raise ZeroDivisionError
        return calls[-1]

    with Journal.create(path, made):
        for step in range(steps):
            if odd and step == 2:
                loss()
            if odd and step == 3:
                with contextlib.suppress(ZeroDivisionError):
                    made.step(fails)
            if odd and step == 5:
                model.state_dict()
            for i, group in enumerate(made.param_groups):
                group["lr"] = lr * (1 - step / steps) * (i + 1)
            made.step((lambda: float("nan")) if odd and step == 6 else loss)
    made.handle.restore()
    return base, model
