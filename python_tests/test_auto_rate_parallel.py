"""lr="auto" in several processes: each finds the same rate, and a journal of their run replays to its bits."""

import pytest
import torch
from torch import distributed, nn

from lozo_kernels import LOZO
from lozo_kernels.journal import Journal, replay
from lozo_kernels.optim.rate_finder import WARM_UP

if not distributed.is_available() or not distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)

from python_tests.parallel_helpers import finish, logs, start

STEPS, EXAMPLES = 40, 12
CASES = {
    "examples": ({"fuse_steps": True}, "examples"),
    "examples, one-sided": ({"two_sided": False, "directions": 2}, "examples"),
    "examples, probe": ({"placement": "probe", "momentum": 0.9}, "examples"),
    "directions": ({"directions": 5}, "directions"),
    "directions, one-sided": ({"directions": 3, "two_sided": False, "placement": "probe"}, "directions"),
}


def model_of():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(EXAMPLES, 6, generator=generator)
    return x, x[:, :3] - x[:, 3:]


def run(name, rank, ranks, path=None):
    options, mode = CASES[name]
    model = model_of()
    optimizer = LOZO(model, lr="auto", rank=2, interval=10, parallel=mode if ranks > 1 else None, **options)
    journal = None if path is None else Journal.create(path, optimizer)
    part = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks) if mode == "examples" else slice(None)
    rates, losses = [], []
    for step in range(STEPS):
        x, y = batch(step)
        losses.append(float(optimizer.step(lambda some: (model(some[0]) - some[1]).square().sum(1), (x[part], y[part]))))
        rates.append(optimizer.learning_rates[0])
    optimizer.flush()
    optimizer.handle.merge()
    found = {"rates": rates, "losses": losses, "weights": {n: p.clone() for n, p in model.state_dict().items()}}
    if journal is not None:
        journal.finish()
    return found


def work(rank, ranks, folder):
    found = {name: run(name, rank, ranks, folder / f"{name}-{rank}.journal") for name in CASES}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    assert finish(start(2, folder, work)) == [0, 0], logs(folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_all_processes_find_the_same_rate(found, name):
    one, other = (ranks[name] for ranks in found[1])
    assert one["rates"] == other["rates"] and one["losses"] == other["losses"]
    assert not any(one["rates"][: WARM_UP - 1]) and all(rate > 0 for rate in one["rates"][WARM_UP:])
    assert all(torch.equal(p, other["weights"][n]) for n, p in one["weights"].items())


@pytest.mark.parametrize("name", ["directions", "directions, one-sided"])
def test_shared_directions_find_the_rate_of_one_process(found, name):
    """Every process has the whole batch, so nothing but who evaluates what differs."""
    alone = run(name, 0, 1)
    assert alone["rates"] == pytest.approx(found[1][0][name]["rates"], rel=1e-3)
    assert alone["losses"] == pytest.approx(found[1][0][name]["losses"], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_journal_of_any_process_replays(found, name):
    folder, ranks = found
    for rank in range(2):
        model = model_of()
        assert replay(model, folder / f"{name}-{rank}.journal").agrees
        assert all(torch.equal(p, ranks[rank][name]["weights"][n]) for n, p in model.state_dict().items())


def disagreeing(rank, ranks, folder):
    with pytest.raises((ValueError, RuntimeError), match="learning rate"):
        LOZO(model_of(), lr="auto" if rank else 1e-3, parallel="examples")


def test_processes_with_other_kinds_of_rates_are_refused(tmp_path):
    assert finish(start(2, tmp_path, disagreeing)) == [0, 0], logs(tmp_path)
