"""The loops of published zeroth-order trainers in small: their call points, state and arithmetic, with noise that can be exchanged.

Losses are scripted, so that two runs differ by the rounding of their weights only; ``seen`` keeps the weights of every evaluation.
"""

import math
import types

import numpy as np
import torch
from torch import nn

from lozo_kernels.kernels import noise


class TinyLM(nn.Module):
    """A model with names that rules of weight decay look at, and a tied decoder whose name comes first in the alphabet."""

    def __init__(self, width=9, vocabulary=17, tied=True):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.ln = nn.LayerNorm(width)
        self.gain = nn.Parameter(torch.ones(width))
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.decoder.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def copy_of(model):
    twin = TinyLM(model.embed.weight.shape[1], model.embed.weight.shape[0], tied=model.decoder.weight is model.embed.weight)
    twin.load_state_dict(model.state_dict())
    return twin.to(model.embed.weight.dtype)


class TorchNoise:
    """The noise of the trainers: one global generator, read in their order."""

    def reset(self, seed):
        torch.manual_seed(seed)

    def state(self):
        return torch.get_rng_state()

    def set_state(self, state):
        torch.set_rng_state(state)

    def z(self, p):
        return torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)

    def u(self, p, rank):
        return torch.randn(p.data.size(0), rank, device=p.data.device, dtype=p.data.dtype)

    def v(self, p, rank, window):
        return torch.randn(p.data.size(1), rank, device=p.data.device, dtype=p.data.dtype)

    def s(self, p, shape):
        return torch.normal(mean=0, std=1, size=shape, device=p.data.device, dtype=p.data.dtype)

    def subspace(self, p, shape, rank, window):
        return tuple(torch.linalg.qr(torch.randn(n, rank))[0].to(p.dtype) for n in shape)


class ContractNoise:
    """This library's noise as tensors. U, Z and S have the seed of the step; what lasts longer has a seed of its own."""

    def __init__(self, model, seed):
        names = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        self.ids = {key: noise.tensor_id(min(group)) for key, group in names.items()}
        self.lasting, self.seed = seed, None

    def reset(self, seed):
        self.seed = int(seed)

    def state(self):
        return self.seed

    def set_state(self, state):
        self.seed = state

    def z(self, p):
        return noise.dense(self.seed, p.numel(), self.ids[id(p)], 0).view(p.shape).to(p.dtype)

    def u(self, p, rank):
        return noise.factor(self.seed, p.shape[0], rank, self.ids[id(p)], 0).to(p.dtype)

    def v(self, p, rank, window):
        return noise.factor(self.lasting, p.shape[1], rank, self.ids[id(p)], window, stream="V").to(p.dtype)

    def s(self, p, shape):
        return noise.factor(self.seed, *shape, self.ids[id(p)], 0, stream="S").to(p.dtype)

    def subspace(self, p, shape, rank, window):
        bases = []
        for n, stream in zip(shape, "UV", strict=True):
            q, r = torch.linalg.qr(noise.factor(self.lasting, n, rank, self.ids[id(p)], window, stream=stream).double())
            scaled = q * r.diagonal().sign() * n**0.5  # on the grid of the noise, so that a library's last bits are nothing
            bases.append((torch.round(scaled * 256) / 256 / n**0.5).float())
        return tuple(bases)


class Miniature:
    """A model, arguments and scripted losses."""

    def __init__(self, model, losses, source=None, **args):
        defaults = {"zo_eps": 1e-2, "weight_decay": 0.0, "gradient_accumulation_steps": 1, "learning_rate": 0.05, "seed": 5}
        self.args = types.SimpleNamespace(**defaults | args)
        self.model, self.noise = model, source or TorchNoise()
        self.losses, self.seen = iter(losses), []
        self.schedule = 0
        self.lr_scheduler = types.SimpleNamespace(step=self._advance)

    def _advance(self):
        self.schedule += 1

    def _get_learning_rate(self):
        return self.args.learning_rate / (1 + self.schedule)

    def see(self, model):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    def zo_forward(self, model, inputs):
        self.see(model)
        return torch.tensor(next(self.losses))

    def _list(self, model):
        self.named_parameters_to_optim = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def _decays(self, name):
        return all(word not in name for word in ("bias", "layer_norm", "layernorm"))

    def _two_points(self, perturb, model):
        self.zo_random_seed = np.random.randint(1000000000)
        perturb(scaling_factor=1)
        plus = self.zo_forward(model, None)
        perturb(scaling_factor=-2)
        minus = self.zo_forward(model, None)
        self.projected_grad = ((plus - minus) / (2 * self.args.zo_eps)).item()
        perturb(scaling_factor=1)
        return plus

    def _perturb(self, p, scale, direction):
        """Perturbs a weight with the published arithmetic."""
        p.data = p.data + scale * direction * self.args.zo_eps

    def _descend(self, name, p, direction):
        """Updates a weight with the published arithmetic, in which every term is a new tensor."""
        decay = self.args.weight_decay * p.data if self._decays(name) else 0
        p.data = p.data - self._get_learning_rate() * (direction + decay)

    def run(self, steps):
        for _ in range(steps):
            self.step_once()


class MezoLarge(Miniature):
    def step_once(self):
        self.zo_step(self.model, None)
        self.zo_update(self.model)

    def zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        self.noise.reset(random_seed if random_seed is not None else self.zo_random_seed)
        for _, p in self.named_parameters_to_optim:
            self._perturb(p, scaling_factor, self.noise.z(p))

    def zo_step(self, model, inputs):
        self._list(model)
        return self._two_points(self.zo_perturb_parameters, model)

    def zo_update(self, model):
        self.noise.reset(self.zo_random_seed)
        for name, p in self.named_parameters_to_optim:
            self._descend(name, p, self.projected_grad * self.noise.z(p))
        self.lr_scheduler.step()


class MezoMedium(Miniature):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.zero_order_eps = self.args.zo_eps
        self.args.zero_order_use_trainer_optim = False

    def efficient_perturb_parameters(self, model, random_seed, scaling_factor=1):
        self.noise.reset(random_seed)
        for _, p in self.named_parameters_to_optim:
            self._perturb(p, scaling_factor, self.noise.z(p))
        return model

    def step_once(self):  # a stretch of their train()
        model = self.model
        self._list(model)
        random_seed = np.random.randint(1000000000)
        model = self.efficient_perturb_parameters(model, random_seed)
        plus = self.zo_forward(model, None)
        model = self.efficient_perturb_parameters(model, random_seed, scaling_factor=-2)
        minus = self.zo_forward(model, None)
        c = (plus - minus) / (2 * self.args.zero_order_eps)
        model = self.efficient_perturb_parameters(model, random_seed)
        self.noise.reset(random_seed)
        for _, p in self.named_parameters_to_optim:
            z = self.noise.z(p)
            p.data = p.data - self.args.learning_rate * (c * z + self.args.weight_decay * p.data)


class LozoLarge(Miniature):
    """LOZO's large trainer; with ``args.rank`` and ``beta1`` the medium one."""

    def step_once(self):
        self.lowrank_zo_step(self.model, None)
        self.lowrank_zo_update()

    @property
    def rank(self):
        return getattr(self.args, "rank_r", None) or self.args.rank

    def lowrank_zo_step(self, model, inputs):
        if hasattr(self, "step"):
            self.step += 1
        else:
            self.step, self.v, self.v_old, self.exp_avg_m = 0, {}, {}, {}
        self._list(model)
        return self._two_points(self.lowrank_zo_perturb_parameters, model)

    def lowrank_zo_perturb_parameters(self, random_seed=None, scaling_factor=1):
        self.noise.reset(random_seed if random_seed is not None else self.zo_random_seed)
        for name, p in self.named_parameters_to_optim:
            if p.data.ndim >= 2:
                if self.step % self.args.step_interval == 0:
                    self.v[name] = self.noise.v(p, self.rank, self.step // self.args.step_interval)
                direction = self.noise.u(p, self.rank) @ self.v[name].t()
            else:
                direction = self.noise.z(p)
            self._perturb(p, scaling_factor, direction)

    def lowrank_zo_update(self):
        self.noise.reset(self.zo_random_seed)
        for name, p in self.named_parameters_to_optim:
            direction = self.noise.u(p, self.rank) @ self.v[name].t() if p.data.ndim >= 2 else self.noise.z(p)
            self._descend(name, p, self.projected_grad * direction)
        self.lr_scheduler.step()


class LozoMedium(LozoLarge):
    def step_once(self):
        self.lowrank_zo_step(self.model, None)
        self.lowrank_zo_update_momentum()

    def lowrank_zo_update_momentum(self):
        self.noise.reset(self.zo_random_seed)
        beta, nu, m = self.args.beta1, self.args.step_interval, self.exp_avg_m
        for name, p in self.named_parameters_to_optim:
            matrix = p.data.ndim >= 2
            new = self.projected_grad * (self.noise.u(p, self.rank) if matrix else self.noise.z(p))
            if matrix and self.step % nu == 0:
                if name in self.v_old:
                    v_old = self.v_old[name]
                    m[name] = beta * m[name] @ v_old.t() @ self.v[name] / v_old.shape[0] + (1 - beta) * new
                else:
                    m[name] = new
            elif self.step == 0:
                m[name] = new
            else:
                if matrix and self.step % nu == nu - 1:
                    self.v_old[name] = self.v[name]
                m[name] = beta * m[name] + (1 - beta) * new
            self._descend(name, p, m[name] @ self.v[name].t() if matrix else m[name])
        self.lr_scheduler.step()


class SubZeroMini(Miniature):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.p_state, self.update_steps = {}, 0
        self.state = types.SimpleNamespace(global_step=0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)

    def step_once(self):
        self.zo_subspace_step(self.model, None)
        self.zo_subspace_update(self.model)
        self.state.global_step += 1

    def _shape(self, p):
        if getattr(self.args, "mode", "ft") in ("lora", "prefix", "prompt"):
            best = max(a for a in range(1, math.isqrt(p.numel()) + 1) if p.numel() % a == 0)
            return best, p.numel() // best
        return tuple(p.shape)

    def zo_subspace_step(self, model, inputs):
        self.named_parameters_to_optim = []
        window = self.state.global_step // self.args.update_interval
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if len(torch.squeeze(p.data).shape) != 2:
                self.named_parameters_to_optim.append((name, p, torch.Tensor([1.0]), torch.Tensor([1.0])))
                continue
            if self.state.global_step % self.args.update_interval == 0:
                u, v = self.noise.subspace(p, self._shape(p), self.args.gauss_rank, window)
                self.p_state[name] = {"U": u, "V": v.t().contiguous()}
            self.named_parameters_to_optim.append((name, p, self.p_state[name]["U"], self.p_state[name]["V"]))
        return self._two_points(self.zo_subspace_perturb_parameters, model)

    def _direction(self, p, u, v):
        if u.dim() == 1:
            return self.noise.z(p)
        s = self.noise.s(p, (u.shape[1], v.shape[0]))
        return (u @ s @ v * math.sqrt(p.data.numel() / s.numel())).view(p.data.shape)

    def zo_subspace_perturb_parameters(self, random_seed=None, scaling_factor=1):
        self.noise.reset(random_seed if random_seed is not None else self.zo_random_seed)
        for _, p, u, v in self.named_parameters_to_optim:
            self._perturb(p, scaling_factor, self._direction(p, u, v))

    def zo_subspace_update(self, model):
        self.noise.reset(self.zo_random_seed)
        for _, p, u, v in self.named_parameters_to_optim:
            p.grad = self.projected_grad * self._direction(p, u, v)
            self.optimizer.step()
            p.grad = None
        self.update_steps += 1
        self.lr_scheduler.step()
