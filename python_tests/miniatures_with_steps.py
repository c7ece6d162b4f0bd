"""Miniatures of the trainers whose update is part of a step (ZO-LLM) or of the optimiser (zo2); see miniatures.py."""

import types
from collections import deque

import numpy as np
import torch

from python_tests.miniatures import Miniature, TorchNoise


class ZoLlmMini(Miniature):
    def __init__(self, *args, momentum=0.0, decay=0.0, optimizer=None, **kwargs):
        super().__init__(*args, **{"q": 1, "perturbation_mode": "two_side", "trainer": "zo_sgd"} | kwargs)
        make = optimizer or (lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=momentum, weight_decay=decay))
        self.optimizer = make(self.model.parameters(), lr=self.args.learning_rate)
        self.gradient_sparsity = None
        self.method = "zo_step"

    def step_once(self):
        getattr(self, self.method)(self.model, None)

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        self.noise.reset(random_seed if random_seed is not None else self.zo_random_seed)
        for _, p in self.named_parameters_to_optim:
            self._perturb(p, scaling_factor, self.noise.z(p))

    def _probe(self, model):
        if self.args.perturbation_mode == "two_side":
            return self._two_points(self.zo_perturb_parameters, model)
        self.zo_random_seed = np.random.randint(1000000000)
        self.zo_perturb_parameters(scaling_factor=1)
        plus = self.zo_forward(model, None)
        self.zo_perturb_parameters(scaling_factor=-1)
        self.projected_grad = ((plus - self.zo_forward(model, None)) / self.args.zo_eps).item()
        return plus

    def _update(self, sign=1.0):
        self.noise.reset(self.zo_random_seed)
        c = np.sign(self.projected_grad) if self.args.trainer == "zo_sign_opt" else self.projected_grad
        for _, p in self.named_parameters_to_optim:
            p.grad = sign * (c * self.noise.z(p)) / self.args.q
            self.optimizer.step()
            p.grad = None

    @torch.no_grad()
    def zo_step(self, model, inputs):
        self._list(model)
        loss = self._probe(model)
        self._update()
        return loss

    @torch.no_grad()
    def zo_step_v1(self, model, inputs):
        self._list(model)
        for _ in range(self.args.q):
            loss = self._probe(model)
            self.noise.reset(self.zo_random_seed)
            for _, p in self.named_parameters_to_optim:
                part = self.projected_grad * self.noise.z(p) / self.args.q
                p.grad = part if p.grad is None else p.grad + part
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def zo_step_v2(self, model, inputs):
        """Does what v2 is meant to do, which is v1 without gradients in memory. The published code loses track of its noise."""
        return self.zo_step_v1(model, inputs)

    @torch.no_grad()
    def zo_conserv_step(self, model, inputs):
        self._list(model)
        start = self.zo_forward(model, None)
        self._probe(model)
        self._update()
        forward = self.zo_forward(model, None)
        self._update(-2.0)
        back = self.zo_forward(model, None)
        if forward > start:
            if start < back:
                self._update()
        elif forward < back:
            self._update(2.0)
        return forward

    def zo_step_with_module_wise_perturbation(self, model, inputs):
        raise NotImplementedError


class Zo2Mini:
    """zo2's optimiser without offloading: a step over the whole model."""

    def __init__(self, model, losses, source=None, *, lr=0.05, weight_decay=0.0):
        self.model, self.noise, self.losses, self.seen = model, source or TorchNoise(), iter(losses), []
        self.lr, self.weight_decay, self.zo_eps, self.debug_mode = lr, weight_decay, 1e-2, False
        self.args = types.SimpleNamespace(seed=5)
        self.projected_grad, self.zo_random_seed = 0, None

    def run(self, steps):
        for _ in range(steps):
            self.zo_forward()

    def zo_perturb_shifts(self):
        return [1, -2, 1]

    @torch.inference_mode()
    def zo_perturb_parameters(self, module, scaling_factor=1):
        for _, p in module.named_parameters():
            if p.requires_grad:
                p.data.add_(scaling_factor * self.noise.z(p) * self.zo_eps)

    @torch.inference_mode()
    def zo_update(self, module, weight_decay=None):
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            z, wd = self.noise.z(p), weight_decay
            if wd is None:
                wd = 0.0 if any(x in name for x in ("bias", "layer_norm", "layernorm", "ln")) else self.weight_decay
            p.data.sub_(self.lr * (self.projected_grad * z + wd * p.data))

    def see(self, model):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    def loss(self):
        self.see(self.model)
        return torch.tensor(next(self.losses))

    @torch.inference_mode()
    def zo_forward(self, *args, **kwargs):
        self.zo_random_seed = np.random.randint(1000000000)
        found = []
        for shift in self.zo_perturb_shifts()[:2]:
            self.noise.reset(self.zo_random_seed)
            self.zo_perturb_parameters(self.model, scaling_factor=shift)
            found.append(self.loss())
        self.projected_grad = ((found[0] - found[1]) / (2 * self.zo_eps)).item()
        self.noise.reset(self.zo_random_seed)
        self.zo_perturb_parameters(self.model, scaling_factor=self.zo_perturb_shifts()[2])
        self.noise.reset(self.zo_random_seed)
        self.zo_update(self.model)
        return found[0]


class Zo2OffloadedMini(Zo2Mini):
    """zo2 with offloading: goes block by block, and updates each with the result of the previous step just before perturbing it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rstate, self.rstate_queue, self.last_rstate = None, deque(maxlen=2), None

    @torch.inference_mode()
    def zo_update(self, module, weight_decay=None):
        self.noise.set_state(self.last_rstate)
        super().zo_update(module, weight_decay)
        self.last_rstate = self.noise.state()
        return module

    def module_dual_forward(self, module, projected_grad, weight_decay=None):
        if projected_grad != 0:
            module = self.zo_update(module, weight_decay)
        for shift in self.zo_perturb_shifts():
            self.noise.set_state(self.rstate)
            self.zo_perturb_parameters(module, scaling_factor=shift)
            self.see(module)
        self.rstate = self.noise.state()

    @torch.inference_mode()
    def zo_forward(self, *args, **kwargs):
        self.zo_random_seed = np.random.randint(1000000000)
        self.noise.reset(self.zo_random_seed)
        self.rstate = self.noise.state()
        self.rstate_queue.append(self.rstate)
        if len(self.rstate_queue) == 2:
            self.last_rstate = self.rstate_queue.popleft()
        for name, module in self.model.named_children():
            self.module_dual_forward(module, self.projected_grad, 0.0 if name == "ln" else None)
        plus, minus = (torch.tensor(next(self.losses)) for _ in range(2))
        self.projected_grad = ((plus - minus) / (2 * self.zo_eps)).item()
        return plus
