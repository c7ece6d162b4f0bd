"""What an earlier version wrote is read, and gives the same bits, or is refused in one line where the contract on bits has another
version; and what programs take from the package is still there."""

import importlib
import json

import pytest
import torch

from lozo_kernels.errors import JournalError
from lozo_kernels.journal import read_journal, replay
from python_tests.earlier import make

NAMES = json.loads((make.HERE / "public_names.json").read_text(encoding="utf-8"))
SAVED = {name: torch.load(make.folder_of(name) / "states.pt", weights_only=True)[name] for name in make.RUNS}
ONE_LINE = (
    r"^.* was made with version %d of the contract on bits \(docs/noise.md\), and this lozo_kernels makes version %d of such a run"
)


def journal_of(name):
    return make.folder_of(name) / f"{name}.journal"


def same(model, expected):
    return all(torch.equal(p, expected[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("name", make.RUNS)
def test_a_journal_is_replayed(name):
    model = make.Net().to(SAVED[name]["final"]["linear.weight"].dtype)
    replayed = replay(model, journal_of(name))
    assert replayed.agrees and replayed.steps == make.STEPS
    assert same(model, SAVED[name]["final"])
    assert read_journal(journal_of(name)).header.about == {"run": name}


@pytest.mark.parametrize("name", make.RUNS)
def test_a_run_goes_on_from_its_state(name):
    model, optimizer, _ = make.build(name)
    model.load_state_dict(SAVED[name]["weights"])
    optimizer.load_state_dict(SAVED[name]["state"])
    assert optimizer.steps_done == make.SAVED_AFTER
    make.take(model, optimizer, range(make.SAVED_AFTER, make.STEPS))
    optimizer.handle.merge()
    optimizer.flush()
    assert same(model, SAVED[name]["final"])


@pytest.mark.parametrize("name", make.RUNS)
def test_a_whole_run_is_the_same(name, tmp_path):
    model, optimizer, journal = make.build(name, tmp_path)
    make.take(model, optimizer, range(make.SAVED_AFTER))
    optimizer.state_dict()
    make.take(model, optimizer, range(make.SAVED_AFTER, make.STEPS))
    journal.finish()
    assert same(model, SAVED[name]["final"])


@pytest.mark.parametrize(("name", "version", "folder"), make.REFUSED)
def test_a_run_of_another_contract_is_refused_in_one_line(name, version, folder):
    model, optimizer, _ = make.build(name)
    before = make.weights(model)
    line = ONE_LINE % (version, make.VERSIONS[name])
    with pytest.raises(JournalError, match=line) as error:
        replay(make.Net(), folder / f"{name}.journal")
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match=line) as error:
        optimizer.load_state_dict(torch.load(folder / "states.pt", weights_only=True)[name]["state"])
    assert len(str(error.value).splitlines()) == 1
    assert same(model, before) and optimizer.steps_done == 0


@pytest.mark.parametrize("name", make.RUNS)
def test_a_state_names_its_contract(name):
    _, optimizer, _ = make.build(name)
    assert optimizer.state_dict()["noise_version"] == make.VERSIONS[name]


@pytest.mark.parametrize("module", [name for name in NAMES if name != "schemas"])
def test_public_names_stay(module):
    found = importlib.import_module("lozo_kernels" if module == "lozo_kernels" else f"lozo_kernels.{module}")
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []
    if module == "lozo_kernels":
        assert set(NAMES[module]) <= set(found.__all__)


def test_torch_operators_stay():
    for schema in NAMES["schemas"]:
        name = schema.split("::")[1].split("(")[0]
        assert str(getattr(torch.ops.lozo_kernels, name).default._schema) == schema
