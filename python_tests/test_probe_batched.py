"""Several evaluations in one forward pass."""

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, BatchSplitError, MeZO
from python_tests.models import Zoo, same, weights

transformers = pytest.importorskip("transformers")

from python_tests.architectures import build, run  # noqa: E402


def example_losses(model):
    """A closure that takes tokens and returns a loss for each example."""

    def losses(tokens):
        logits = model(tokens[:, :-1]).float()
        return (
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            .view(len(tokens), -1)
            .mean(1)
        )

    return losses


def twins(**options):
    """The same model twice, with an optimiser that evaluates one by one and one that evaluates together."""
    torch.manual_seed(0)
    models = [Zoo().eval(), Zoo().eval()]
    models[1].load_state_dict(models[0].state_dict())
    settings = {"placement": "probe", "lr": 1e-3, "eps": 1e-2, "rank": 2, "interval": 4, **options}
    return [(m, LOZO(m, evaluation=e, **settings)) for m, e in zip(models, ("sequential", "batched"), strict=True)]


@pytest.mark.parametrize("side", ["activation", "scratch", "copy"])
@pytest.mark.parametrize(
    "options", [{}, {"directions": 3}, {"two_sided": False, "directions": 2, "momentum": 0.9, "weight_decay": 0.1}]
)
def test_losses_equal_the_sequential_ones(side, options, rng):
    pairs = twins(side=side, **options)
    tokens = torch.randint(0, 11, (3, 9))
    for _ in range(6):
        infos = []
        for model, optimizer in pairs:
            optimizer.step(example_losses(model), tokens)
            infos.append(optimizer.info)
        assert torch.allclose(infos[0].loss_plus, infos[1].loss_plus, rtol=1e-5)
        assert torch.allclose(infos[0].loss_minus, infos[1].loss_minus, rtol=1e-5)
    for _, optimizer in pairs:
        optimizer.handle.restore()
    for a, b in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_one_forward_pass_a_step():
    model = Zoo().eval()
    optimizer = LOZO(model, placement="probe", rank=2, directions=2, evaluation="batched")
    tokens = torch.randint(0, 11, (3, 9))
    calls = []
    losses = example_losses(model)

    def counting(tokens):
        calls.append(len(tokens))
        return losses(tokens)

    optimizer.step(counting, tokens)
    calls.clear()
    optimizer.step(counting, tokens)
    assert calls == [12]


def test_sums_and_weights_and_micro_batches():
    tokens = torch.randint(0, 11, (4, 9))
    mask = torch.rand(4, 8) < 0.7
    mask[:, 0] = True
    infos = []
    for model, optimizer in twins(side="activation"):

        def masked(batch, model=model):
            tokens, mask = batch["tokens"], batch["mask"]
            logits = model(tokens[:, :-1]).float()
            each = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
                len(tokens), -1
            )
            return (each * mask).sum(1), mask.sum(1)

        batch = {"tokens": tokens, "mask": mask}
        optimizer.step([masked, masked], [batch, {"tokens": tokens.flip(1), "mask": mask}])
        infos.append(optimizer.info)
    assert torch.allclose(infos[0].loss_plus, infos[1].loss_plus, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "bert", "mixtral", "mamba", "vit", "whisper"])
@pytest.mark.parametrize("side", ["activation", "scratch"])
def test_real_architectures(name, side):
    model, inputs = build(name)
    run(model, inputs)
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()}

    def losses(batch):
        examples = len(next(iter(batch.values())))
        return run(model, batch)[1].float().reshape(examples, -1).square().mean(1)

    infos = []
    for evaluation in ("sequential", "batched"):
        optimizer = LOZO(model, placement="probe", lr=0.0, eps=1e-2, rank=2, side=side, evaluation=evaluation)
        optimizer.step(losses, inputs)
        infos.append(optimizer.info)
        optimizer.handle.restore()
    assert torch.allclose(infos[0].loss_plus, infos[1].loss_plus, rtol=1e-5)
    assert torch.allclose(infos[0].loss_minus, infos[1].loss_minus, rtol=1e-5)


@pytest.mark.parametrize("name", ["t5", "switch_transformers", "bart"])
def test_a_model_that_cannot_be_split_is_one_clear_error(name):
    model, inputs = build(name)
    run(model, inputs)
    before = weights(model)
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()}

    def losses(batch):
        examples = len(next(iter(batch.values())))
        return run(model, batch)[1].float().reshape(examples, -1).square().mean(1)

    optimizer = LOZO(model, placement="probe", side="activation", rank=2, evaluation="batched")
    with pytest.raises(BatchSplitError, match="use evaluation='sequential'"):
        optimizer.step(losses, inputs)
    assert same(weights(model), before) and optimizer.steps_done == 0


class Mixing(nn.Module):
    """Normalises over the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return ((y - y.mean(0)) / y.std(0)).pow(3).mean(1)


def test_a_closure_that_mixes_examples_is_one_clear_error():
    model = Mixing()
    optimizer = LOZO(model, placement="probe", side="activation", rank=2, evaluation="batched")
    with pytest.raises(BatchSplitError, match="mixes the examples of a batch"):
        optimizer.step(model, torch.randn(8, 4))


def test_bad_input():
    model = Zoo().eval()
    optimizer = LOZO(model, placement="probe", rank=2, evaluation="batched")
    tokens = torch.randint(0, 11, (3, 9))
    losses = example_losses(model)
    with pytest.raises(TypeError, match=r"needs step\(closure, inputs\)"):
        optimizer.step(lambda: losses(tokens).mean())
    with pytest.raises(TypeError, match="one loss for each of the 6 examples"):
        optimizer.step(lambda tokens: losses(tokens).mean(), tokens)
    with pytest.raises(ValueError, match="examples in their first dimension"):
        optimizer.step(losses, {"a": tokens, "b": tokens[:2]})
    with pytest.raises(ValueError, match="2 inputs for 1 closures"):
        optimizer.step([losses], [tokens, tokens])
    with pytest.raises(ValueError, match="one number of examples"):
        optimizer.step([losses, losses], [tokens, tokens[:2]])
    optimizer.step(losses, tokens)


def test_what_is_perturbed_in_place_cannot_share_a_pass():
    model = nn.Linear(4, 4)
    optimizer = LOZO(model, placement="probe", rank=2, evaluation="batched")
    with pytest.raises(RuntimeError, match="is perturbed in place"):
        optimizer.step(lambda x: nn.functional.linear(x, model.weight).mean(1), torch.randn(3, 4))


def test_mezo_can_share_a_pass_on_the_weight_side():
    model = Zoo().eval()
    tokens = torch.randint(0, 11, (3, 9))
    optimizer = MeZO(model, placement="probe", lr=1e-3, evaluation="batched")
    for _ in range(3):
        assert torch.isfinite(optimizer.step(example_losses(model), tokens))
