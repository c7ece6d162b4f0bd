"""Other projects' trainers, served by this library's kernels, follow the arithmetic of their own."""

import numpy as np
import pytest
import torch
from torch import nn

from lozo_kernels.adapters import DirectionBackend, accelerate_trainer
from python_tests.miniatures import ContractNoise, LozoLarge, LozoMedium, MezoLarge, MezoMedium, SubZeroMini, TinyLM, copy_of
from python_tests.miniatures_with_steps import Zo2Mini, Zo2OffloadedMini, ZoLlmMini

LOZO = {"rank_r": 2, "step_interval": 3}
MEDIUM = {"rank": 3, "step_interval": 3, "beta1": 0.8}
SUBZERO = {"gauss_rank": 3, "update_interval": 3}
DECAY = {"weight_decay": 0.3}
CASES = {
    "mezo": (MezoLarge, DECAY),
    "mezo medium": (MezoMedium, DECAY),
    "lozo": (LozoLarge, LOZO | DECAY),
    "lozo medium": (LozoMedium, MEDIUM | DECAY),
    "subzero": (SubZeroMini, SUBZERO),
    "subzero, square": (SubZeroMini, SUBZERO | {"mode": "lora"}),
    "zo-llm": (ZoLlmMini, {"decay": 0.3}),
    "zo-llm, momentum": (ZoLlmMini, {"momentum": 0.7}),
    "zo-llm, signs of one side": (ZoLlmMini, {"perturbation_mode": "one_side", "trainer": "zo_sign_opt"}),
    "zo2": (Zo2Mini, DECAY),
}
BY_NAME = pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)


def script(rng, count=200):
    return [rng.gauss(0.0, 0.02) for _ in range(count)]


def tiny(rng, **options):
    return TinyLM(rng.choice((5, 9, 12)), rng.choice((7, 17)), **options)


def run(trainer, steps, seed):
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    trainer.run(steps)


def trained(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def assert_followed(served, own, tolerance=2e-5):
    """Equal up to fp32 rounding at every evaluation and at the end, with updates that are no rounding."""
    assert len(served.seen) == len(own.seen)
    for a, b in zip([*served.seen, trained(served)], [*own.seen, trained(own)], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert len(own.seen[-1]) != len(own.seen[0]) or (own.seen[-1] - own.seen[0]).abs().max() > 100 * tolerance


@BY_NAME
def test_same_noise_same_trajectory(rng, kind, options):
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    twin = copy_of(model)
    own = kind(model, losses, ContractNoise(model, 5), **options)
    served = kind(twin, losses, **options)
    with accelerate_trainer(served) as adapter:
        assert adapter.served
        for trainer in (own, served):
            run(trainer, 8, seed)
    assert_followed(served, own)
    assert getattr(served, "schedule", 0) == getattr(own, "schedule", 0)


PUBLISHED = CASES | {"lozo medium, no window": (LozoMedium, MEDIUM | {"step_interval": 1})}  # where N never accumulates


@pytest.mark.parametrize(("kind", "options"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_stream_and_defects(rng, kind, options):
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    twin = copy_of(model)
    own, served = kind(model, losses, **options), kind(twin, losses, **options)
    accelerate_trainer(served, compat="published")
    for trainer in (own, served):
        run(trainer, 8, seed)
    assert_followed(served, own)


@pytest.mark.parametrize("compat", (None, "published"))
def test_offloaded_blocks(rng, compat):
    model, losses, seed = tiny(rng, tied=False), script(rng), rng.getrandbits(31)
    twin = copy_of(model)
    own = Zo2OffloadedMini(model, losses, None if compat else ContractNoise(model, 5), **DECAY)
    served = Zo2OffloadedMini(twin, losses, **DECAY)
    accelerate_trainer(served, compat=compat)
    for trainer in (own, served):
        run(trainer, 5, seed)
    assert_followed(served, own)


def test_offloaded_ties_move_once_and_the_last_update_is_made(rng):
    """Block by block with deferred updates, a tied weight included, ends where steps over the whole model end."""
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    model.gain.requires_grad_(False)  # in no block
    twin = copy_of(model)
    twin.gain.requires_grad_(False)
    blocks, whole = Zo2OffloadedMini(model, losses), Zo2Mini(twin, losses)
    adapter = accelerate_trainer(blocks)
    accelerate_trainer(whole)
    for trainer in (blocks, whole):
        run(trainer, 5, seed)
    late = trained(blocks)
    adapter.flush()
    assert (trained(blocks) - trained(whole)).abs().max() < 1e-5 < (late - trained(whole)).abs().max()
    made = trained(blocks)
    adapter.restore()
    assert torch.equal(trained(blocks), made), "the update was made twice"
    with accelerate_trainer(blocks):
        run(blocks, 1, seed)
        late = trained(blocks)
    assert not torch.equal(trained(blocks), late), "an update that was owed is lost"


@pytest.mark.parametrize("compat", (None, "published"))
def test_where_v_is_new_the_update_follows_the_probe_unless_published(rng, compat):
    trainer = LozoLarge(tiny(rng), script(rng), **LOZO)
    accelerate_trainer(trainer, compat=compat)
    start = trained(trainer)
    run(trainer, 1, rng.getrandbits(31))
    probe = (trainer.seen[0] - start) / trainer.args.zo_eps
    step = (trained(trainer) - start) / (-trainer.args.learning_rate * trainer.projected_grad)
    assert (torch.corrcoef(torch.stack((probe, step)))[0, 1] > 0.99) == (compat is None)


def test_a_log_of_seeds_and_scalars_replays(rng):
    model = tiny(rng)
    replayed, trainer = copy_of(model), LozoLarge(model, script(rng), **LOZO, seed=11)
    accelerate_trainer(trainer)
    backend = DirectionBackend(replayed, rank=2, v_seed=11, scaling="published")
    np.random.seed(rng.getrandbits(31))
    for step in range(7):
        lr = trainer._get_learning_rate()
        trainer.run(1)
        backend.enter_window(step // 3)
        backend.update([trainer.zo_random_seed], [trainer.projected_grad], lr)
    assert (trained(trainer) - torch.cat([p.detach().flatten() for p in replayed.parameters()])).abs().max() < 1e-5


@pytest.mark.parametrize(("method", "q"), (("zo_step_v1", 3), ("zo_step_v2", 3), ("zo_conserv_step", 1)))
@pytest.mark.parametrize("sgd", ({"decay": 0.3}, {"momentum": 0.7}), ids=("decay", "momentum"))
def test_other_steps_of_zo_llm(rng, method, q, sgd):
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    twin = copy_of(model)
    own = ZoLlmMini(model, losses, ContractNoise(model, 5), q=q, **sgd)
    served = ZoLlmMini(twin, losses, q=q, **sgd)
    accelerate_trainer(served)
    for trainer in (own, served):
        trainer.method = method
        run(trainer, 4, seed)
    assert_followed(served, own)


def test_storage_is_found_at_every_call(rng):
    """Storage replaced between passes, and Parameters replaced between steps."""
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    trainer, still = LozoMedium(model, losses, **MEDIUM), LozoMedium(copy_of(model), losses, **MEDIUM)
    forward = trainer.zo_forward

    def moving(model, inputs):
        for p in model.parameters():
            p.data = p.data.clone()
        return forward(model, inputs)

    trainer.zo_forward = moving
    for t in (trainer, still):
        accelerate_trainer(t)
        run(t, 2, seed)
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().clone())
    for t in (trainer, still):
        run(t, 3, seed)
    assert torch.equal(trained(trainer), trained(still))


def test_state_of_the_trainer_is_what_is_used_and_goes_on_after_restore(rng):
    trainer = LozoMedium(tiny(rng), script(rng), **MEDIUM)
    own = {name: getattr(trainer, name).__func__ for name in ("lowrank_zo_perturb_parameters", "lowrank_zo_update_momentum")}
    adapter = accelerate_trainer(trainer)
    run(trainer, 2, 1)
    weight, before = trainer.model.fc1.weight, trainer.seen[-1]
    trainer.step += 0
    assert trainer.v["fc1.weight"].shape == (weight.shape[1], 3) and trainer.exp_avg_m["fc1.weight"].shape == (weight.shape[0], 3)
    assert trainer.exp_avg_m["gain"].shape == trainer.model.gain.shape and before.isfinite().all()
    v = trainer.v["fc1.weight"].clone()
    run(trainer, 2, 1)  # into the next window
    assert not torch.equal(trainer.v["fc1.weight"], v)
    adapter.restore()
    adapter.restore()
    for name, function in own.items():
        assert name not in vars(trainer) and getattr(trainer, name).__func__ is function
    assert trainer.v["fc1.weight"].dtype == trainer.exp_avg_m["fc1.weight"].dtype == torch.float32
    run(trainer, 4, 2)
    assert trained(trainer).isfinite().all()


def test_subspaces_are_seeded_and_shown(rng):
    model = tiny(rng)
    twins = [SubZeroMini(m, [0.1, 0.0] * 9, **SUBZERO) for m in (model, copy_of(model), copy_of(model))]
    for trainer, seed in zip(twins, (1, 1, 2), strict=True):
        accelerate_trainer(trainer, seed=seed)
        torch.manual_seed(rng.getrandbits(31))  # where the trainer would take them from
        np.random.seed(3)
        trainer.run(2)
    first, again, other = (t.p_state["fc1.weight"]["U"] for t in twins)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.allclose(first.T @ first / len(first), torch.eye(3), atol=5e-3)
    assert torch.equal(first * 256, torch.round(first * 256))  # on the grid, where products are exact
    assert torch.equal(trained(twins[0]), trained(twins[1]))


@pytest.mark.parametrize("kind", (MezoLarge, LozoLarge, SubZeroMini), ids=lambda k: k.__name__)
def test_half_precision_with_stochastic_rounding(rng, kind):
    model = tiny(rng).bfloat16()
    losses, ends = script(rng), []
    for rounding in ("nearest", "stochastic", "stochastic"):
        trainer = kind(copy_of(model), losses, **LOZO, **SUBZERO, learning_rate=1e-4)
        accelerate_trainer(trainer, rounding=rounding)
        run(trainer, 4, 1)
        ends.append(trainer.model.fc1.weight.detach())
        assert ends[-1].dtype == torch.bfloat16 and ends[-1].isfinite().all()
    assert torch.equal(ends[1], ends[2]) and not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("kind", (LozoMedium, SubZeroMini), ids=lambda k: k.__name__)
def test_state_made_in_inference_mode_goes_on_outside_of_it(rng, kind):
    trainer = kind(tiny(rng), script(rng), **MEDIUM, **SUBZERO)
    accelerate_trainer(trainer, backend="eager")
    with torch.inference_mode():
        run(trainer, 1, 1)
    run(trainer, 4, 1)
    assert trained(trainer).isfinite().all()


def test_an_unknown_trainer_is_told_what_was_looked_for():
    with pytest.raises(TypeError, match=r"Linear has the methods of no known.*lowrank_zo_update.*efficient_perturb_parameters"):
        accelerate_trainer(nn.Linear(2, 2))


def unsupported(kind, **attributes):
    trainer = kind(TinyLM(), [0.0] * 9, **LOZO, **SUBZERO) if kind is not Zo2Mini else kind(TinyLM(), [])
    for name, value in attributes.items():
        target = trainer.args if hasattr(trainer.args, name) else trainer
        setattr(target, name, value)
    return trainer


@pytest.mark.parametrize(
    ("kind", "attributes", "words"),
    (
        (ZoLlmMini, {"gradient_sparsity": 0.5}, "gradient_sparsity"),
        (MezoMedium, {"zero_order_use_trainer_optim": True}, "zero_order_use_trainer_optim"),
        (SubZeroMini, {"gauss_rank": 65}, "gauss_rank is 65"),
        (Zo2Mini, {"debug_mode": True}, "debug_mode"),
    ),
)
def test_settings_that_are_not_served(kind, attributes, words):
    trainer = unsupported(kind, **attributes)
    with pytest.raises(ValueError, match=words):
        accelerate_trainer(trainer)
    assert not any(hasattr(value, "lozo_adapter") for value in vars(trainer).values())


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (lambda ps, lr: torch.optim.Adam(ps, lr=lr), "Adam.*compat='published'"),
        (lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, nesterov=True), "nesterov"),
        (lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, weight_decay=0.1), "momentum and weight decay"),
        (lambda ps, lr: torch.optim.SGD(list(ps)[:1], lr=lr), "does not have"),
    ),
)
def test_optimizers_that_are_not_served(make, words):
    trainer = ZoLlmMini(TinyLM(), [0.0] * 9, optimizer=make)
    accelerate_trainer(trainer)
    before = trained(trainer)
    with pytest.raises(ValueError, match=words):
        trainer.run(1)
    assert torch.equal(trained(trainer), before)


def test_what_is_refused_by_name():
    trainer = ZoLlmMini(TinyLM(), [0.0] * 9)
    adapter = accelerate_trainer(trainer)
    with pytest.raises(RuntimeError, match="served already"):
        accelerate_trainer(trainer)
    with pytest.raises(RuntimeError, match="module-wise"):
        trainer.zo_step_with_module_wise_perturbation(None, None)
    adapter.restore()
    for wrong in ({"compat": "mezo"}, {"rounding": "up"}, {"compat": "published", "rounding": "stochastic"}):
        with pytest.raises(ValueError, match=r"compat is one of|rounding is one of"):
            accelerate_trainer(trainer, **wrong)
