"""What forwards change besides weights: random generators of all kinds, and buffers. All evaluations of a step start alike."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from transformers import HubertConfig, HubertForCTC, Wav2Vec2Config, Wav2Vec2ForCTC, WavLMConfig, WavLMForCTC

from lozo_kernels import LOZO, MeZO

OPTIONS = [
    {},
    {"fuse_steps": True},
    {"two_sided": False, "directions": 2},
    {"placement": "probe"},
    {"placement": "probe", "side": "scratch", "directions": 2},
]
SPEECH = [(Wav2Vec2Config, Wav2Vec2ForCTC), (HubertConfig, HubertForCTC), (WavLMConfig, WavLMForCTC)]


@pytest.mark.parametrize(("config", "kind"), SPEECH, ids=lambda x: x.__name__)
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_speech_models_mask_with_numpy(config, kind, placement):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 9}
    few = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    more = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.5, "mask_time_length": 2}
    model = kind(config(**sizes, **few, **more, hidden_dropout=0.1, layerdrop=0.0)).train()
    audio, labels = torch.randn(2, 640), torch.randint(1, 9, (2, 4))
    optimizer = LOZO(model, lr=0.0, eps=1e-6, placement=placement, include=["lm_head.*"])
    optimizer.step(lambda: model(input_values=audio, labels=labels).loss)
    spread = float((optimizer.info.loss_plus - optimizer.info.loss_minus).abs())
    assert spread < 1e-4 * float(optimizer.info.loss)  # other masks change the loss by a tenth and more


DRAWS = {
    "random": random.random,
    "random.gauss": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy normal, which keeps every second number": lambda: float(np.random.randn()),
    "numpy choice": lambda: float(np.random.choice(5)),
    "torch": lambda: float(torch.rand(())),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_evaluation_draws_the_same(options, draw):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 4)
    optimizer = LOZO(model, lr=1e-3, eps=1e-3, **options)
    seen = []

    def loss():
        seen.append(draw())
        return (model(x) * seen[-1]).square().mean()

    drawn = set()
    for _ in range(4):
        seen.clear()
        draw()
        optimizer.step(loss)
        assert len(set(seen)) == 1 and len(seen) >= 2
        drawn.add(seen[0])
    after = draw()
    assert len(drawn) > 1 or draw is DRAWS["numpy choice"]
    assert after != seen[0] or draw is DRAWS["numpy choice"]


def test_without_common_random_numbers_draws_differ():
    model, x, seen = nn.Linear(4, 2), torch.randn(3, 4), []
    optimizer = LOZO(model, common_random_numbers=False)

    def loss():
        seen.append((random.random(), np.random.rand(), float(torch.rand(()))))
        return model(x).square().mean()

    optimizer.step(loss)
    assert all(a != b for a, b in zip(*seen, strict=True))


def norms():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6, momentum=None))


class Queue(nn.Module):
    """Keeps what it saw last, like the queue of MoCo, in a buffer that is another tensor each time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        y = self.head(x) + self.seen
        self.seen = 0.5 * self.seen + 0.5 * x.mean(0)
        self.count += 1
        return y


class Large(nn.Module):
    """A buffer that is too large to be kept unless it is written."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("memory", torch.zeros(600, 600))

    def forward(self, x):
        y = self.head(x) + self.memory[0, :4]
        self.memory += 1e-3 * x.mean()
        return y


MODELS = {
    "batch norm": norms,
    "queue": Queue,
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 2)),
    "parametrised spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [norms, Queue], ids=lambda f: f.__name__)
def test_buffers_advance_once_per_step(make, options, micro_batches):
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    optimizer = LOZO(model, lr=0.0, eps=1e-6, **options)
    for _ in range(3):
        batches = [torch.randn(8, 4) for _ in range(micro_batches)]
        optimizer.step([lambda x=x: model(x).square().mean() for x in batches])
        with torch.no_grad():
            for x in batches:
                plain(x)
    expected = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.allclose(buffer.float(), expected[name].float(), atol=1e-4), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_evaluation_starts_from_the_same_buffers(make, options):
    model, x = make().train(), torch.randn(8, 4)
    names = ["0.weight_orig"] if hasattr(model[0] if isinstance(model, nn.Sequential) else model, "weight_orig") else []
    optimizer = MeZO(model, lr=1e-3, eps=1e-3, exclude=names or None, **options)
    seen = []

    def loss():
        seen.append(torch.cat([b.detach().flatten().double() for b in model.buffers()]))
        return model(x).square().mean()

    for _ in range(3):
        seen.clear()
        optimizer.step(loss)
        assert len(seen) >= 2 and all(torch.equal(one, seen[0]) for one in seen)


def test_large_buffers_are_kept_once_they_were_written():
    model, x = Large(), torch.randn(8, 4)
    optimizer = LOZO(model, lr=1e-3)
    before = []

    def loss():
        before.append(float(model.memory[0, 0]))
        return model(x).square().mean()

    for _ in range(3):
        before.clear()
        optimizer.step(loss)
    assert before[0] == before[1]


@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_a_step_that_fails_leaves_buffers_as_they_were(placement):
    model, x = norms(), torch.randn(8, 4)
    optimizer = LOZO(model, placement=placement)
    optimizer.step(lambda: model(x).square().mean())
    before = {name: b.clone() for name, b in model.named_buffers()}
    calls = []

    def fails():
        calls.append(model(x))
        if len(calls) == 2:
            raise KeyError("here")
        return calls[0].square().mean()

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_buffers_that_move_or_come_later():
    model, x = norms(), torch.randn(8, 4)
    optimizer = LOZO(model, lr=0.0, eps=1e-3)
    optimizer.step(lambda: model(x).square().mean())
    model.bfloat16()
    optimizer.step(lambda: model(x.bfloat16()).square().mean())
    model[1].register_buffer("more", torch.zeros(2))
    optimizer.step(lambda: model(x.bfloat16()).square().mean())
    assert int(model[1].num_batches_tracked) == 3
