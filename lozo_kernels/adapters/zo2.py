"""zo2's optimisers (liangyuwang/zo2): MeZOSGD over a whole model, MeZO2SGD over offloaded blocks with a deferred update."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modules import own_parameters
from .base import Settings, TrainerAdapter
from .listed import Pairs, decay_of_names
from .streams import perturb_dense, update_dense

WITHOUT_DECAY = ("bias", "layer_norm", "layernorm", "ln")
"""Words in names, as seen from the module that is updated, of parameters that zo2 does not decay."""


class Zo2Adapter(TrainerAdapter):
    """Serves ``zo_perturb_parameters(module)`` and ``zo_update(module)`` of an optimiser and of those inside its model.

    Noise depends on the parameter's name in the whole model and the step's ``zo_random_seed``, not on the state of a generator
    that is carried from block to block: a tied weight has one direction, and is updated once. MeZO2SGD updates a block when it is
    next used, so the last update of a run is still to be made: :meth:`flush` makes it, before an evaluation or before saving.
    """

    family = "zo2"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        if getattr(trainer, "debug_mode", False):
            raise self._refuse("debug_mode has ones in place of noise; turn it off")
        self._deferred = hasattr(trainer, "module_dual_forward")
        self._previous: int | None = None
        self._inside = False
        self._updated: set[int] = set()
        self._probed: set[int] = set()
        self._places: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()

    def serve(self) -> None:
        """Replaces the methods. If updates are deferred, also ``zo_forward``, which makes the new seed."""
        t = self.trainer
        self._moved = self._weights()
        inner = [getattr(module, "opt", None) for module in t.model.modules()]
        for target in {id(o): o for o in (t, *inner) if hasattr(o, "zo_perturb_parameters")}.values():
            self._replace("zo_perturb_parameters", self._perturbing(target), target)
            self._replace("zo_update", self._updating(target), target)
            if self._deferred and self.settings.compat is None:
                self._replace("zo_forward", self._stepping(target), target)

    def _stepping(self, optimizer: Any) -> Any:
        forward = optimizer.zo_forward

        def zo_forward(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                self._previous = optimizer.zo_random_seed
                self._updated.clear()
            outer, self._inside = self._inside, True
            try:
                return forward(*args, **kwargs)
            finally:
                self._inside = outer

        return zo_forward

    def flush(self) -> None:
        """Makes the update that is still to be made to blocks of MeZO2SGD, so that the weights are those of the last step."""
        t = self.trainer
        if not self._deferred or self._restored or self.settings.compat == "published":
            return
        c, seed = float(getattr(t, "projected_grad", 0.0)), getattr(t, "zo_random_seed", None)
        if c and seed is not None:
            with torch.inference_mode(False), torch.no_grad():
                owed = [pair for pair in self._pairs(t.model) if id(pair[1]) in self._probed]
                if owed:
                    self._move(owed, seed, t, c, None)
                    self._called.add("zo_update")
        t.projected_grad = 0.0

    def restore(self) -> None:
        """Gives every method back, after :meth:`flush`: only this adapter knows the noise of the last update."""
        self.flush()
        super().restore()

    def _pairs(self, module: nn.Module) -> Pairs:
        """The trained parameters of a part of the model by their names in the whole model, each with its name in the part."""
        places = self._places.get(module)
        if places is None:
            names = {id(p): name for name, p in self.trainer.model.named_parameters()}
            places = self._places[module] = []
            for name, p in module.named_parameters():
                prefix, _, attribute = name.rpartition(".")
                places.append((names.get(id(p), name), own_parameters(module.get_submodule(prefix)), attribute, name))
        found = ((name, owned[attribute], inside) for name, owned, attribute, inside in places)
        return [pair for pair in found if pair[1].requires_grad]

    def _perturbing(self, optimizer: Any) -> Any:
        def zo_perturb_parameters(module: nn.Module, scaling_factor: float = 1) -> None:
            pairs, scale = self._pairs(module), scaling_factor * optimizer.zo_eps
            if self.settings.compat == "published":
                perturb_dense(pairs, None, scale)
            elif pairs:
                self._probed.update(id(p) for _, p, _ in pairs)
                self._moved.perturb(pairs, optimizer.zo_random_seed, scale)

        return zo_perturb_parameters

    def _updating(self, optimizer: Any) -> Any:
        def zo_update(module: nn.Module, weight_decay: float | None = None) -> nn.Module:
            pairs, c = self._pairs(module), optimizer.projected_grad
            if self.settings.compat == "published":
                self._published(optimizer, pairs, weight_decay)
                return module
            seed = self._previous if self._deferred else optimizer.zo_random_seed
            if self._deferred:  # block by block, and a tied weight is in several blocks
                pairs = [pair for pair in pairs if id(pair[1]) not in self._updated]
                self._updated.update(id(p) for _, p, _ in pairs)
            if pairs and seed is not None:
                self._move(pairs, seed, optimizer, c, weight_decay)
            return module

        return zo_update

    def _move(self, pairs: Pairs, seed: int, optimizer: Any, c: float, weight_decay: float | None) -> None:
        lr = optimizer.lr
        wd, without = (optimizer.weight_decay, WITHOUT_DECAY) if weight_decay is None else (weight_decay, ())
        decay = decay_of_names((name for *_, name in pairs), without, lr, wd)
        self._moved.update(pairs, seed, -lr * c, decay=decay)

    def _published(self, optimizer: Any, pairs: Pairs, weight_decay: float | None) -> None:
        lr, c = optimizer.lr, optimizer.projected_grad
        wd, without = (optimizer.weight_decay, WITHOUT_DECAY) if weight_decay is None else (weight_decay, ())
        generator = _generator(pairs) if self._deferred else None
        if generator is not None:
            generator.set_rng_state(optimizer.last_rstate)
        named = [(name, p) for _, p, name in pairs]
        update_dense(named, None, -lr * c, lr=lr, weight_decay=wd, without=without)
        if generator is not None:
            optimizer.last_rstate = generator.get_rng_state()


def _generator(pairs: Pairs) -> Any:
    """The module whose global generator makes the noise of these parameters."""
    first: Tensor | None = pairs[0][1] if pairs else None
    return None if first is None else (torch.cuda if first.is_cuda else torch)
