"""Faults of trainers of other projects: one that is recognised is served, or says why not; nothing is served in vain in silence."""

import types
import warnings

import pytest
import torch

from lozo_kernels.adapters import accelerate_trainer
from python_tests.miniatures import ContractNoise, LozoLarge, LozoMedium, MezoLarge, MezoMedium, SubZeroMini, TinyLM, copy_of
from python_tests.miniatures_with_steps import Zo2Mini, ZoLlmMini
from python_tests.test_adapters import DECAY, LOZO, MEDIUM, SUBZERO, assert_followed, run, script, tiny, trained


class SubZeroOrMezo(SubZeroMini):
    """SubZero's trainer with its switch: ``args.trainer`` chooses SubZero, its MeZO, or back-propagation."""

    def __init__(self, *args, trainer="zo_sgd", momentum=0.0, decay=0.0, optimizer=None, **kwargs):
        super().__init__(*args, **SUBZERO, **kwargs)
        self.args.trainer = trainer
        make = optimizer or (lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=momentum, weight_decay=decay))
        self.optimizer = make(self.model.parameters(), lr=self.args.learning_rate)

    def step_once(self):
        if self.args.trainer in ("zo_sgd", "zo_adam"):
            self.zo_step(self.model, None)
            self.zo_update(self.model)
            self.state.global_step += 1
        elif self.args.trainer == "subzero_sgd":
            super().step_once()

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        self.noise.reset(random_seed if random_seed is not None else self.zo_random_seed)
        for _, p in self.named_parameters_to_optim:
            self._perturb(p, scaling_factor, self.noise.z(p))

    @torch.no_grad()
    def zo_step(self, model, inputs):
        self._list(model)
        return self._two_points(self.zo_perturb_parameters, model)

    def zo_update(self, model):
        self.noise.reset(self.zo_random_seed)
        for _, p in self.named_parameters_to_optim:
            p.grad = self.projected_grad * self.noise.z(p)
            self.optimizer.step()
            p.grad = None
        self.update_steps += 1
        self.lr_scheduler.step()


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.7}, {"decay": 0.3}], ids=str)
@pytest.mark.parametrize("compat", [None, "published"])
def test_subzeros_own_example_with_zo_sgd(rng, sgd, compat):
    model, losses, seed = tiny(rng), script(rng), rng.getrandbits(31)
    twin = copy_of(model)
    own = SubZeroOrMezo(model, losses, None if compat else ContractNoise(model, 5), **sgd)
    served = SubZeroOrMezo(twin, losses, **sgd)
    with accelerate_trainer(served, compat=compat) as adapter:
        assert "zo_perturb_parameters" in adapter.served and ("zo_update" in adapter.served) == (compat is None)
        for trainer in (own, served):
            run(trainer, 6, seed)
    assert_followed(served, own)
    assert served.schedule == own.schedule == served.update_steps == 6


def test_subzeros_trainer_is_served_as_its_switch_says(rng):
    trainer = SubZeroOrMezo(tiny(rng), script(rng), trainer="subzero_sgd")
    with accelerate_trainer(trainer) as adapter:
        assert adapter.served == ("zo_subspace_perturb_parameters", "zo_subspace_update")
        run(trainer, 2, 1)


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr)


def test_adam_of_subzeros_trainer(rng):
    trainer = SubZeroOrMezo(tiny(rng), script(rng), trainer="zo_adam", optimizer=adam)
    with pytest.raises(ValueError, match=r"zo_adam keeps state.*compat='published'"):
        accelerate_trainer(trainer)
    model, losses = tiny(rng), script(rng)
    own, served = (SubZeroOrMezo(m, losses, trainer="zo_adam", optimizer=adam, learning_rate=1e-3) for m in (model, copy_of(model)))
    with accelerate_trainer(served, compat="published"):
        for trainer in (own, served):
            run(trainer, 3, 7)
    assert_followed(served, own)


def test_an_optimizer_that_is_no_sgd_is_refused_before_a_weight_moves(rng):
    trainer = SubZeroOrMezo(tiny(rng), script(rng), optimizer=adam)
    before = trained(trainer)
    with pytest.raises(ValueError, match=r"only torch\.optim\.SGD"), accelerate_trainer(trainer):
        run(trainer, 1, 1)
    assert torch.equal(trained(trainer), before)


def with_setting(kind, options, **settings):
    trainer = kind(TinyLM(), [0.0] * 9, **options)
    trainer.args = types.SimpleNamespace(**vars(trainer.args) | settings)
    return trainer


OFF = {
    "SubZero, regular": (SubZeroOrMezo, {}, {"trainer": "sgd"}, "args.trainer is 'sgd', and 'subzero_sgd'.*'zo_sgd' or 'zo_adam'"),
    "SubZero, forward gradient": (SubZeroOrMezo, {}, {"trainer": "forward_grad"}, "'forward_grad'"),
    "MeZO, none": (MezoLarge, {}, {"trainer": "none"}, "args.trainer is 'none', and 'zo' calls"),
    "MeZO, regular": (MezoLarge, {}, {"trainer": "regular"}, "'regular'"),
    "MeZO medium": (MezoMedium, {}, {"zero_order_optim": False}, "args.zero_order_optim is False, and True calls"),
    "LOZO large": (LozoLarge, LOZO, {"trainer": "regular"}, "'LOZO' calls"),
    "LOZO medium": (LozoMedium, MEDIUM, {"lowrank_zo": False, "trainer": "standard"}, "args.lowrank_zo is False"),
    "ZO-LLM": (ZoLlmMini, {}, {"trainer": "forward_grad"}, "'zo_sgd' or 'zo_sign_opt'"),
}


@pytest.mark.parametrize("compat", [None, "published"])
@pytest.mark.parametrize(("kind", "options", "settings", "words"), OFF.values(), ids=OFF)
def test_a_trainer_whose_steps_call_nothing_of_it(kind, options, settings, words, compat):
    trainer = with_setting(kind, options, **settings)
    with pytest.raises(ValueError, match=rf"nothing of it would be served.*{words}"):
        accelerate_trainer(trainer, compat=compat)
    assert not any(hasattr(value, "lozo_adapter") for value in vars(trainer).values())


ON = {
    "MeZO": (MezoLarge, DECAY, {"trainer": "zo"}),
    "MeZO medium": (MezoMedium, DECAY, {"zero_order_optim": True, "trainer": "standard"}),
    "LOZO large": (LozoLarge, LOZO, {"trainer": "LOZO"}),
    "LOZO medium": (LozoMedium, MEDIUM, {"lowrank_zo": True, "trainer": "standard"}),
    "ZO-LLM": (ZoLlmMini, {}, {"trainer": "zo_sign_opt"}),
}


@pytest.mark.parametrize(("kind", "options", "settings"), ON.values(), ids=ON)
def test_a_run_that_is_served_ends_without_a_word(kind, options, settings):
    trainer = with_setting(kind, options, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with accelerate_trainer(trainer):
            run(trainer, 2, 1)


def test_noise_in_memory_is_refused_in_either_way():
    for compat in (None, "published"):
        with pytest.raises(ValueError, match="without efficient_zero_order"):
            accelerate_trainer(with_setting(MezoMedium, {}, efficient_zero_order=False), compat=compat)


@pytest.mark.parametrize("kind", [MezoLarge, ZoLlmMini, SubZeroMini, Zo2Mini], ids=lambda k: k.__name__)
def test_restore_says_that_nothing_was_called(kind):
    """A subclass, or a version of a repository with another loop, that steps in some way of its own."""
    trainer = kind(TinyLM(), [0.0] * 9, **(SUBZERO if kind is SubZeroMini else {}))
    adapter = accelerate_trainer(trainer)
    with pytest.warns(UserWarning, match=r"called none of the methods that were served: its steps are its own"):
        adapter.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.restore()


def test_restore_says_that_updates_were_the_trainers_own():
    class Own(LozoLarge):
        def step_once(self):
            self.lowrank_zo_step(self.model, None)

    trainer = Own(TinyLM(), [0.0] * 9, **LOZO)
    with pytest.warns(UserWarning, match=r"called no served update \(lowrank_zo_update"), accelerate_trainer(trainer):
        run(trainer, 1, 1)


def test_a_run_that_fails_says_only_why_it_failed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), accelerate_trainer(MezoLarge(TinyLM(), [0.0])):
            raise KeyError("data")
