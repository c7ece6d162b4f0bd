"""The methods that LOZO is compared with: what each step does to the weights, and all methods through one loop."""

import json
import math

import pytest
import torch
from models import Zoo, same, weights, zoo_loss

from lozo_kernels import MeZO, handle_of
from lozo_kernels.errors import InputError, NonFiniteLossError
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.loop.baselines import FirstOrder, ForwardGradient, LoRA
from lozo_kernels.hf.loop.building import build_driver
from lozo_kernels.hf.loop.drivers import MAX_NONFINITE
from lozo_kernels.hf.measure import PeakMemory, peak_memory
from lozo_kernels.hf.methods import METHODS
from lozo_kernels.hf.settings import Settings

transformers = pytest.importorskip("transformers")

TRAINED = [name for name, method in METHODS.items() if method.trains]


def llama(layers=2, **settings):
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, pad_token_id=0, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def token_loss(model, rng, batch=3, length=11):
    ids = torch.randint(1, 53, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, -rng.randint(1, 4) :] = 0
    return lambda: model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss


def test_sgd_is_a_gradient_step_by_hand(rng):
    model, lr = Zoo(), rng.uniform(0.01, 0.3)
    loss = zoo_loss(model)
    start = weights(model)
    value = loss()
    expected = torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad])
    by_name = dict(zip([n for n, p in model.named_parameters() if p.requires_grad], expected, strict=True))
    driver = build_driver(model, Settings(method="ft-sgd", lr=lr, momentum=0.0))
    with torch.no_grad():  # the loop may be inside of it
        returned = driver.step([loss])
    assert float(returned) == pytest.approx(float(value.detach()))
    for name, p in model.named_parameters():
        moved = start[name] - lr * by_name[name] if name in by_name else start[name]
        assert torch.allclose(p, moved, rtol=0, atol=1e-6), name
        assert p.grad is None
    assert driver.steps_done == 1 and driver.info.c.numel() == 0


@pytest.mark.usefixtures("rng")
def test_adamw_moves_each_weight_by_lr_at_first():
    model, lr = torch.nn.Linear(5, 3), 0.01
    x = torch.randn(7, 5)
    start = weights(model)
    build_driver(model, Settings(method="ft", lr=lr, momentum=0.0)).step([lambda: model(x).square().mean()])
    for name, p in model.named_parameters():
        assert torch.allclose((p - start[name]).abs(), torch.full_like(p, lr), rtol=1e-3)


@pytest.mark.parametrize("make", [lambda _: (m := Zoo(), zoo_loss(m)), lambda rng: (m := llama(), token_loss(m, rng))])
def test_forward_gradient_is_the_directional_derivative(make, rng):
    model, loss = make(rng)
    seed, lr, decay = rng.getrandbits(31), 3e-3, 0.1
    start = weights(model)
    value = loss()
    value.backward()
    value = value.detach()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    driver = ForwardGradient(model, lr=lr, weight_decay=decay, seed=seed)
    z = {name: driver.handle.materialize(name, 0) for name in driver.handle.names}
    assert z.keys() == grads.keys()
    derivative = sum(float((grads[name] * z[name].double()).sum()) for name in z)
    assert float(driver.step([loss])) == pytest.approx(float(value), rel=1e-5)
    assert float(driver.info.c) == pytest.approx(derivative, rel=1e-4, abs=1e-4)
    for name, p in model.named_parameters():
        moved = (1 - lr * decay) * start[name] - lr * derivative * z[name] if name in z else start[name]
        assert torch.allclose(p, moved, rtol=1e-4, atol=1e-5 + 1e-4 * lr * abs(derivative)), name
        assert p.grad is None
    driver.close()
    assert handle_of(model) is None


def test_forward_gradient_in_double_precision(rng):
    """The same number to 1e-9 where the model computes in float64 around fp32 weights."""
    model = torch.nn.Linear(6, 4)
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss():
        return torch.nn.functional.linear(x, model.weight.double(), model.bias.double()).tanh().square().mean()

    driver = ForwardGradient(model, lr=1e-3, seed=rng.getrandbits(31))
    z = [driver.handle.materialize(name, 0).double() for name in ("weight", "bias")]
    double = [p.detach().double().requires_grad_() for p in model.parameters()]
    exact = torch.autograd.grad(torch.nn.functional.linear(x, *double).tanh().square().mean(), double)
    driver.step([loss])
    assert float(driver.info.c) == pytest.approx(sum(float((g * d).sum()) for g, d in zip(exact, z, strict=True)), rel=1e-9)


def test_forward_gradient_is_mezo_without_its_eps(rng):
    """The same seed gives the same Z at every step, and MeZO's estimate is this derivative up to O(eps^2)."""
    seed = rng.getrandbits(31)
    ours, theirs = Zoo(), Zoo()
    theirs.load_state_dict(ours.state_dict())
    driver, mezo = ForwardGradient(ours, lr=1e-4, seed=seed), MeZO(theirs, lr=1e-4, eps=2e-4, seed=seed)
    for _ in range(20):
        driver.step([zoo_loss(ours)])
        mezo.step(zoo_loss(theirs))
        assert float(driver.info.c) == pytest.approx(float(mezo.info.c), rel=0.02, abs=0.02)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_lora_changes_adapters_only_and_merges_them(rng, tmp_path):
    pytest.importorskip("peft")
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    loss = token_loss(model, rng)
    start = weights(model)
    before = torch.get_rng_state()
    driver = LoRA(model, lr=0.05, weight_decay=0.0, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    losses = [float(driver.step([loss])) for _ in range(20)]
    assert losses[-1] < losses[0]
    inner = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert same(start, {name: p.detach() for name, p in inner.items()})
    assert any("lora_" in name and bool(p.detach().abs().sum()) for name, p in model.named_parameters())
    with torch.no_grad():
        adapted = float(loss())
    driver.close()
    end = weights(model)
    assert end.keys() == start.keys() and not same(start, end)
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert changed == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qv"}
    for name in changed:
        assert int(torch.linalg.matrix_rank(end[name] - start[name], rtol=1e-4)) <= 8
    with torch.no_grad():
        assert float(loss()) == pytest.approx(adapted, rel=1e-4)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    model.save_pretrained(tmp_path)
    assert same(end, weights(type(model).from_pretrained(tmp_path)))


@pytest.mark.usefixtures("rng")
def test_lora_of_a_classifier_trains_its_head():
    pytest.importorskip("peft")
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, max_position_embeddings=24,
        num_labels=3,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config).eval()
    ids, labels = torch.randint(3, 40, (6, 9)), torch.randint(0, 3, (6,))
    start = weights(model)
    driver = build_driver(model, Settings(method="ft-lora", lr=0.02, momentum=0.0))
    for _ in range(3):
        driver.step([lambda: model(input_ids=ids, labels=labels).loss])
    driver.close()
    end = weights(model)
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert end.keys() == start.keys()
    assert {name.split(".")[0] for name in changed} == {"classifier", "roberta"}
    assert all("query" in name or "value" in name for name in changed if name.startswith("roberta"))


@pytest.mark.parametrize("make", [FirstOrder, ForwardGradient])
def test_a_loss_that_is_not_finite_moves_nothing_and_ends_the_run(make):
    model = torch.nn.Linear(3, 2)
    driver = FirstOrder(torch.optim.SGD(model.parameters(), lr=0.1)) if make is FirstOrder else make(model, lr=0.1)
    start = weights(model)

    def bad():
        return model(torch.full((1, 3), math.nan)).sum()

    with pytest.warns(UserWarning, match="not finite"):
        driver.step([bad])
    assert driver.info.skipped
    driver.step([lambda: model(torch.zeros(1, 3)).sum() * 0.0])
    assert not driver.info.skipped
    with pytest.warns(UserWarning), pytest.raises(NonFiniteLossError, match=f"{MAX_NONFINITE} steps in a row"):
        for _ in range(MAX_NONFINITE):
            driver.step([bad])
    assert same(start, weights(model)) and driver.steps_done == MAX_NONFINITE + 2


@pytest.mark.parametrize("name", TRAINED)
def test_twenty_steps_through_the_command(name, tmp_path):
    if name == "ft-lora":
        pytest.importorskip("peft")
    settings = Settings(method=name, task="go-again", steps=20, eval_every=10, eval_size=8, batch_size=8, output=str(tmp_path))
    summary = finetune(settings, quiet=True)
    method = METHODS[name]
    assert summary["steps_done"] == 20 and summary["stopped"] is None
    steps = [row for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(20))
    assert {len(row["c"]) for row in steps} == {0 if method.kind == "first-order" else method.directions}
    assert (steps[-1]["lr"] < steps[0]["lr"]) == (method.lr_schedule == "linear")
    assert 0 < summary["inference_peak_bytes"] < summary["training_peak_bytes"]
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    embedded = transformers.AutoModelForCausalLM.from_pretrained(str(_embedded()))
    assert weights(reloaded).keys() == weights(embedded).keys() and not same(weights(reloaded), weights(embedded))


def _embedded():
    from lozo_kernels.hf.demo import MODEL

    return MODEL


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ft", "rank": 4}, "--rank means nothing to --method ft"),
        ({"method": "ft-adamw", "momentum": 0.5}, "--momentum means nothing"),
        ({"method": "forward-grad", "directions": 2}, "--directions means nothing"),
        ({"method": "mezo", "momentum": 0.9}, "is --method mezo-m"),
        ({"method": "subzero", "momentum": 0.9}, "--momentum means nothing"),
        ({"method": "ft-sgd", "dtype": "float16"}, "float32 or bfloat16"),
        ({"method": "ft-lora", "compare_steps": 4}, "the published code has no ft-lora"),
        ({"method": "adam"}, "--method 'adam' is not known"),
        ({"method": "zo-muon", "scaling": "card"}, "--scaling means nothing to --method zo-muon"),
        ({"method": "zo-muon", "normalise": "spread", "lr": 1.0}, "--normalise means nothing"),
    ],
)
def test_settings_that_do_not_fit_a_method(settings, message):
    with pytest.raises(InputError, match=message):
        Settings(**settings).resolved()


def test_resolved_settings_stay_resolved():
    for name in METHODS:
        once = Settings(method=name, task="go-again").resolved()
        assert once.resolved() == once and once.lr == (METHODS[name].embedded_lr if METHODS[name].trains else None)


def test_defaults_of_a_method_are_its_own():
    names = ("rank", "interval", "directions", "one_sided", "lr")
    assert [getattr(Settings(method="zo-muon", model="m", task="sst2").resolved(), n) for n in names] == [64, 100, 4, True, 1e-2]
    chosen = Settings(method="zo-muon", rank=3, one_sided=False, lr=0.1).resolved()
    assert [getattr(chosen, n) for n in names] == [3, 100, 4, False, 0.1]
    assert [getattr(Settings().resolved(), n) for n in names[:-1]] == [2, 50, 1, False]


def test_nothing_to_train_is_said_before_training():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    for name in ("ft", "ft-sgd", "forward-grad"):
        with pytest.raises(InputError, match="cannot be trained by"):
            build_driver(model, Settings(method=name, lr=0.1, momentum=0.0))


def test_peaks_of_blocks_add_up():
    device = torch.device("cpu")
    with peak_memory(device) as first:
        kept = torch.zeros(1000)
    with peak_memory(device) as second:
        more = torch.zeros(500)
        del more
    both = first.then(second)
    assert (first.kept, both.bytes, both.kept) == (4000, 6000, 4000)
    assert PeakMemory(device).then(second).bytes is None and kept is not None
