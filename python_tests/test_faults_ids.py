"""Names that share a tensor id, as two of LoRA on every expert of Qwen3-30B-A3B do: the later one is hashed again."""

import copy

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, MeZO, SubZero, patch
from lozo_kernels.journal import Journal, read_journal, replay, revert, verify
from lozo_kernels.kernels.noise import tensor_id, tensor_ids

FIRST = "base_model.model.model.layers.10.mlp.experts.19.down_proj.lora_A.default.weight"
LATER = "base_model.model.model.layers.32.mlp.experts.92.gate_proj.lora_B.default.weight"
RUNS = [
    *((LOZO, {}), (LOZO, {"momentum": 0.9}), (MeZO, {}), (SubZero, {})),
    *((LOZO, {"placement": "probe"}), (MeZO, {"placement": "probe"})),
]


def qwen_names():
    for layer in range(48):
        at = f"base_model.model.model.layers.{layer}"
        for half in "AB":
            yield from (f"{at}.self_attn.{p}_proj.lora_{half}.default.weight" for p in "qkvo")
            for expert in range(128):
                yield from (f"{at}.mlp.experts.{expert}.{p}_proj.lora_{half}.default.weight" for p in ("gate", "up", "down"))


def test_every_name_of_qwen_has_an_id_of_its_own(rng):
    names = list(qwen_names())
    rng.shuffle(names)
    ids = tensor_ids(names)
    assert len(set(ids.values())) == len(names)
    assert [name for name in names if ids[name] != tensor_id(name)] == [LATER]
    assert tensor_ids(sorted(names)) == ids
    assert tensor_ids(name for name in names if name != FIRST)[LATER] == tensor_id(LATER)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(6, 6, bias=False)
        self.down_proj = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.gate_proj(x)))


class Layer(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.ModuleDict({expert: Expert()})

    def forward(self, x):
        for expert in self.mlp.experts.values():
            x = expert(x)
        return x


class Experts(nn.Module):
    """The two experts of Qwen's layout whose adapters' names share an id."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({"32": Layer("92"), "10": Layer("19")})

    def forward(self, x):
        for layer in self.model.layers.values():
            x = layer(x)
        return x


def adapted(seed=0):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    model = peft.get_peft_model(Experts(), peft.LoraConfig(r=6, target_modules=["gate_proj", "down_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    assert {FIRST, LATER} <= {name for name, _ in model.named_parameters()}
    return model


def loss(model):
    x = torch.linspace(-1, 1, 24).view(4, 6)
    return lambda: model(x).square().mean()


@pytest.mark.parametrize(("kind", "options"), RUNS, ids=str)
def test_they_are_trained_apart(kind, options):
    model = adapted()
    optimizer = kind(model, lr=1e-2, eps=1e-3, **options)
    handle = optimizer.handle
    ids = {p.name: p.tensor_id for p in handle.trained}
    assert len(set(ids.values())) == len(ids)
    assert ids == tensor_ids(ids) and ids[FIRST] == tensor_id(FIRST) != ids[LATER]
    for _ in range(3):
        optimizer.step(loss(model))
    notes = {p.name: p.note for p in handle.report().parameters}
    assert [name for name, note in notes.items() if "hashed again" in note] == [LATER]
    assert "hashed again" in str(handle.report())


def test_the_noise_of_both_differs():
    model = adapted()
    handle = patch(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        handle.perturb_(0, 1.0)
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if name in (FIRST, LATER)}
    assert not torch.allclose(moved[FIRST], moved[LATER], atol=1e-3)


@pytest.mark.parametrize(("kind", "options"), RUNS, ids=str)
def test_its_journal_notes_it_and_replays(tmp_path, kind, options):
    model = adapted()
    base, path = copy.deepcopy(model), tmp_path / "run.journal"
    optimizer = kind(model, lr=1e-2, eps=1e-3, interval=2, **options)
    with Journal.create(path, optimizer):
        for _ in range(5):
            optimizer.step(loss(model))
    optimizer.handle.restore()
    header = read_journal(path).header
    assert header.made_with["hashed_again"] == [LATER]
    assert {p.name: p.tensor_id for p in header.parameters}[LATER] != tensor_id(LATER)
    assert verify(base, path, model).good
    assert replay(copy.deepcopy(base), path).agrees
    assert revert(copy.deepcopy(base), path, 3).steps == 3
    again = copy.deepcopy(base)
    resumed = kind(again, lr=1e-2, eps=1e-3, interval=2, **options)
    assert Journal.resume(path, resumed) == 5


def test_a_journal_without_a_collision_says_nothing_of_it(tmp_path):
    model = nn.Linear(4, 4)
    base, path = copy.deepcopy(model), tmp_path / "run.journal"
    optimizer = LOZO(model, lr=1e-2)
    with Journal.create(path, optimizer):
        optimizer.step(lambda: model(torch.ones(2, 4)).square().mean())
    optimizer.handle.restore()
    assert set(read_journal(path).header.made_with) == {"torch", "python", "backends"}
    assert verify(base, path, model).good


def test_training_one_of_them_alone_keeps_its_bits():
    """A name's id depends on others only where they collide among those that are trained."""
    both, alone = adapted(), adapted()
    for name, p in alone.named_parameters():
        p.requires_grad_(name == LATER)
    ids = [{p.name: p.tensor_id for p in patch(model).trained} for model in (both, alone)]
    assert ids[1] == {LATER: tensor_id(LATER)} and ids[0][LATER] != ids[1][LATER]
