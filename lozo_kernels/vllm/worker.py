"""The workers of an engine that can be trained: vLLM's own, with sites in their modules and some methods more.

``engine_options()`` names a class of this module, of which every process of the engine makes its workers. Sites are put in when the
model is loaded: before it is profiled, compiled or captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError
from ..model.config import PatchConfig
from ..model.parameters import find_parameters
from ..model.passes import Update
from .factors import Factors, Point
from .loading import watched_loader
from .options import KEY, without
from .places import find_places
from .shadow import InEngine, checkpoint_names, shadow_of
from .sites import install
from .tokens import Tokens, runner_of


class Trained:
    """What a worker has besides its model: places, sites, factors, and the slots of tokens.

    Attributes:
        reloaded: the engine has loaded weights that a run learned, and no longer its checkpoint's.
    """

    reloaded = False

    def __init__(self, worker: Any, copies: Sequence[Any], options: Mapping[str, Any]) -> None:
        runner, config = worker.model_runner, PatchConfig(**options["patch"])
        model, settings = runner.get_model(), worker.vllm_config
        shadow = self.shadow = shadow_of(settings.model_config.hf_config, settings.model_config.dtype)
        trained, _ = find_parameters(shadow, config, InEngine)
        places, self.left = find_places(copies, trained, checkpoint_names(shadow), model)
        if not places:
            raise EngineError(f"no parameter of this engine can be trained: {dict(list(self.left.items())[:3])}")
        self.config, self.device = without(config, self.left), worker.device
        self.trained, _ = find_parameters(shadow, self.config, InEngine)
        self.factors = Factors(self.trained, self.config, worker.device)
        self.tokens = Tokens(self.factors, settings.scheduler_config.max_num_batched_tokens, worker.device)
        self.sites, self.overrides = install(model, places, self.factors, self.tokens)
        self.runner = runner_of(runner, self.tokens)
        self.runner.install(self.overrides)
        self.compiled = settings.compilation_config.mode.name != "NONE"


class Methods:
    """What the driver calls on every worker by ``collective_rpc``. The values are plain, so that they pass between processes."""

    lozo: Trained | None = None

    def lozo_begin(self, momentum: bool) -> dict[str, Any]:
        """Begins a run: forgets what another one learned. Returns what is trained and how."""
        trained = self._trained
        trained.factors.reset(momentum=momentum)
        return {
            "names": [p.name for p in trained.trained],
            "left": trained.left,
            "places": {place.name: (place.kind, site.places[0].path) for site in trained.sites for place in site.places},
            "device": str(trained.device),
            "compiled": trained.compiled,
            "reloaded": trained.reloaded,
            "scores": hasattr(trained.runner, "_score_all"),
        }

    def lozo_points(self, step: int, points: Sequence[Point]) -> None:
        """Puts points of a step into the slots from 1 on."""
        self._trained.factors.move(step, [tuple(point) for point in points])  # type: ignore[misc]

    def lozo_window(self, step: int) -> None:
        """Draws the V of a step's window."""
        self._trained.factors.enter_window(step)

    def lozo_update(self, step: int, c: list[float], lr: list[float], decay: list[float] | None, beta: float | None) -> int:
        """Takes up the update of a step. Of lr and decay there is one for all parameters, or one for each.

        Returns:
            How many earlier windows have factors of their own.
        """

        def tensor(values: list[float]) -> Tensor:
            return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64, device="cpu")

        kept, carried = 0.0 if decay is None else tensor(decay), None if beta is None else tensor([beta])
        self._trained.factors.update(Update(step, [tensor([value]) for value in c], tensor(lr), kept, carried))
        return self._trained.factors.windows

    def lozo_scores(self) -> dict[int, tuple[float, int]]:
        """Returns the scores since the last call, and forgets them."""
        scores = self._trained.runner.scores
        found = dict(scores)
        scores.clear()
        return found

    def lozo_check(self, checking: bool) -> dict[str, Any]:
        """Begins or ends a check. Returns the calls of each site and its error since the last call."""
        found = {}
        for site in self._trained.sites:
            found[site.name] = (site.calls, site.error)
            site.calls, site.error, site.checking = 0, None, checking
        return found

    def lozo_learned(self) -> bytes:
        """Returns :meth:`Factors.described` as a file of safetensors, with keys "name:key": vLLM passes no nested tensors on."""
        from safetensors.torch import save

        found = self._trained.factors.described()
        return save({f"{name}:{key}": value.contiguous() for name, own in found.items() for key, value in own.items()})

    def lozo_bank(self) -> None:
        """Ends the factors of this window, as a merge of a probe does; the V stays."""
        self._trained.factors.bank()

    def lozo_forget(self) -> None:
        """Forgets what was learned: the engine's weights have it now."""
        self._trained.reloaded = True
        self._trained.factors.forget()

    def lozo_remove(self) -> None:
        """Gives the engine its own modules back."""
        self._trained.overrides.remove()
        self.lozo = None

    @property
    def _trained(self) -> Trained:
        if self.lozo is None:
            raise RuntimeError("the engine is not trained any more: remove() was called; build it anew")
        return self.lozo


def _worker_of(base: type) -> type:
    """Makes a worker class that watches its model being loaded."""

    class Worker(Methods, base):  # type: ignore[misc]
        def load_model(self, **kwargs: Any) -> None:
            options = (self.vllm_config.additional_config or {}).get(KEY)
            if options is None:
                raise RuntimeError("the engine has this worker without its additional_config: build it with **engine_options()")
            check_engine(self.vllm_config)
            with watched_loader() as copies:
                super().load_model(**kwargs)
            self.lozo = Trained(self, copies, options)

    Worker.__name__ = Worker.__qualname__ = base.__name__
    Worker.__module__ = __name__
    return Worker


def check_engine(config: Any) -> None:
    """Raises ValueError for an engine that would be trained wrongly without a word."""
    refused = {
        "pipeline_parallel_size above 1": config.parallel_config.pipeline_parallel_size > 1,
        "data_parallel_size above 1 (use several engines)": config.parallel_config.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        f"load_format={config.load_config.load_format!r}": config.load_config.load_format
        not in ("auto", "hf", "safetensors", "pt", "mistral", "fastsafetensors", "npcache"),
    }
    wrong = next((name for name, given in refused.items() if given), None)
    if wrong is not None:
        raise ValueError(f"an engine with {wrong} cannot be trained: leave that out")


def __getattr__(name: str) -> Any:  # vLLM's workers are imported by the processes that run them
    if name == "CPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as base
    elif name == "GPUWorker":
        from vllm.v1.worker.gpu_worker import Worker as base
    else:
        raise AttributeError(name)
    made = _worker_of(base)
    globals()[name] = made
    return made
