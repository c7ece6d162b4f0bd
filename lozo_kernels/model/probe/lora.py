"""Exports what a run learned as an adapter that PEFT loads: B V^T of every window is a low-rank matrix already."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import require
from ...kernels.registry import choose_backend
from ..estimators import FactorSpec
from ..files import replacing, write_whole
from ..handle import Handle
from ..modules import own_buffers, own_parameters, unsaved_buffers
from ..parameters import canonical
from ..sharding import gather, reshard
from ..storage import Owner, layer_kind
from .handle import ProbeHandle
from .members import Member

_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter in PEFT's format.

    Attributes:
        config: the content of ``adapter_config.json``.
        tensors: the content of ``adapter_model.safetensors``.
        errors: by module, what truncation left out of its delta: the Frobenius norm of the rest over that of the whole.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    errors: dict[str, float]

    @property
    def rank(self) -> int:
        """The rank of every module's adapter."""
        return self.config["r"]

    def save(self, folder: str | Path) -> None:
        """Writes both files into a folder, which is created. Raises InputError if the package safetensors is not installed."""
        save_file = require("safetensors.torch").save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "adapter_model.safetensors") as part:
            save_file(self.tensors, str(part), metadata={"format": "pt"})
        write_whole(folder / "adapter_config.json", json.dumps(self.config, indent=2) + "\n")


@torch.no_grad()
def export_lora(handle: Handle, folder: str | Path | None = None, *, rank: int | None = None) -> LoraAdapter:
    """Exports what a model learned since it was patched, for ``PeftModel.from_pretrained(base, folder)`` on the model before that.

    The weights of linear layers (Hugging Face's ``Conv1D`` and quantised ones too) and of embeddings become LoRA factors; a tied
    weight becomes one pair for each of its modules. Biases of linear layers and whole other modules, such as norms, are stored as
    they are now (PEFT's ``bias="all"`` and ``modules_to_save``). The model does not change. This can be called between steps and
    after ``restore()``. PEFT does not merge an adapter of tied weights correctly; a warning says so.

    Args:
        handle: of a probe with ``keep_factors=True``, which quantised layers do not need.
        folder: where to write the two files; None writes none.
        rank: of the adapter, which is the best approximation of each delta. None: exact, with r ranks for every window of the run.

    Raises:
        ValueError: the handle keeps no factors, nothing was learned, or something was that an adapter cannot express.
        RuntimeError: a weight decayed since the last merge.
        InputError: the package safetensors is not installed.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is an integer of at least 1, not {rank!r}")
    if not isinstance(handle, ProbeHandle) or handle.config.estimator == "dense" or handle.config.per_example:
        raise ValueError(
            "an adapter is made of factors, which LOZO or SubZero learns with placement='probe' and keep_factors=True: MeZO and "
            "GRZO have none"
        )
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder is a path, not {folder!r}")
    handle.check_decay()
    adapter = _Export(handle, rank).run()
    if folder is not None:
        adapter.save(folder)
    return adapter


class AdapterBuilder:
    """Collects the factors of layers as PEFT keeps them.

    Attributes:
        tensors: the content of ``adapter_model.safetensors``. targets: names of the layers.
        biases: some bias is stored.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {canonical(name): module for name, module in model.named_modules()}
        self.tensors: dict[str, Tensor] = {}
        self.targets: list[str] = []
        self.biases = self._transposed = False

    def add_layer(self, owner: Owner, b: Tensor, v: Tensor) -> str:
        """Adds what a layer learned, b v^T, with b (rows, rank) and v (cols, rank). Returns the name of the layer."""
        name, kind = canonical(owner.path), layer_kind(owner)
        # PEFT adds B A x: a linear layer's weight is (outputs, inputs), those of the others are (inputs, outputs).
        up, down = (b, v.T) if kind == "linear" else (v, b.T)
        self.put(name, "lora_embedding_A" if kind == "embedding" else "lora_A.weight", down)
        self.put(name, "lora_embedding_B" if kind == "embedding" else "lora_B.weight", up)
        self._transposed |= kind == "transposed"
        self.targets.append(name)
        return name

    def put(self, module: str, key: str, value: Tensor) -> None:
        """Stores a tensor of a module."""
        self.tensors[f"{_PREFIX}{module}.{key}"] = value.to("cpu", copy=True).contiguous()

    def config(self, base: str | None, rank: int, saved: Sequence[str] = ()) -> dict[str, Any]:
        """The content of ``adapter_config.json``.

        Args:
            base: the model that the adapter is for.
            saved: modules that are stored whole.
        """
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "all" if self.biases else "none",
            "fan_in_fan_out": self._transposed,
            "target_modules": self._target_modules(),
            "modules_to_save": list(saved) or None,
        }

    def _target_modules(self) -> list[str] | str:
        """Returns names, or a pattern if PEFT, which compares the ends of names, would also match other modules."""
        targets = set(self.targets)
        others = (name for name in self.modules if name not in targets)
        if any(name.endswith(f".{target}") for name in others for target in targets):
            return "|".join(map(re.escape, self.targets))
        return self.targets


class _Export(AdapterBuilder):
    def __init__(self, handle: ProbeHandle, rank: int | None) -> None:
        super().__init__(handle.model)
        self.handle, self.rank = handle, rank
        self.members = {(owner.module, owner.attribute): m for m in handle.members for owner in m.owners}
        self.errors: dict[str, float] = {}

    def run(self) -> LoraAdapter:
        reshard(self.handle.model)
        deltas = {m: _factors(self.handle, m) for m in self.handle.members if m.parameter.low_rank and _is_layer(m)}
        width = max((b.shape[1] for b, _ in deltas.values()), default=0)
        if width == 0:
            raise ValueError("no linear layer or embedding learned anything yet: there is no adapter to make")
        for member, (b, v) in deltas.items():
            self._add_low_rank(member, b, v, self.rank or width)
        saved = self._add_rest([m for m in self.handle.members if m not in deltas])
        base = getattr(getattr(self.handle.model, "config", None), "_name_or_path", None) or None
        return LoraAdapter(self.config(base, self.rank or width, saved), self.tensors, self.errors)

    def _add_low_rank(self, member: Member, b: Tensor, v: Tensor, rank: int) -> None:
        b, v, error = (b, v, 0.0) if self.rank is None else truncate(b, v, rank)
        if len(member.owners) > 1:
            warnings.warn(
                f"{member.name!r} is tied to {', '.join(member.parameter.aliases)}: use the adapter as it is, because PEFT adds it "
                "once for each of them when it merges it (merge_and_unload)",
                stacklevel=5,
            )
        b, v = (widened(x, rank) for x in (b, v))
        for owner in member.owners:
            self.errors[self.add_layer(owner, b, v)] = error

    def _add_rest(self, members: Iterable[Member]) -> list[str]:
        """Stores everything that is not a low-rank delta of a layer. Returns the names of modules that are saved whole."""
        whole, refused = [], []
        for member in members:
            owner = member.owners[0]
            name = canonical(owner.path)
            if owner.attribute == "bias" and _is_linear(owner):
                self.put(name, "base_layer.bias" if name in self.targets else "bias", _current(member))
                self.biases = True
            elif len(member.owners) == 1 and name and not any(True for _ in owner.module.children()):
                whole.append(name)
            else:
                refused.append(member.name)
        # PEFT compares the ends of names, so it may save more modules than were meant.
        whole = [name for name in self.modules if any(name.endswith(end) for end in whole)]
        refused += [name for name in whole if name in self.targets or any(True for _ in self.modules[name].children())]
        if refused:
            raise ValueError(
                f"an adapter cannot say what {', '.join(map(repr, refused[:5]))} learned: save the model's weights instead, or "
                f"train without (patch(model, exclude={refused[:5]}))"
            )
        for name in whole:
            self._put_module(name, self.modules[name])
        return whole

    def _put_module(self, name: str, module: nn.Module) -> None:
        for attribute, p in own_parameters(module).items():
            if p is not None:
                member = self.members.get((module, attribute))
                self.put(name, attribute, gather(p.detach()) if member is None else _current(member))
        for attribute, buffer in own_buffers(module).items():
            if buffer is not None and attribute not in unsaved_buffers(module):
                self.put(name, attribute, buffer)


def widened(factor: Tensor, rank: int) -> Tensor:
    """A factor (rows, ranks) with columns of zeros up to a rank, which is one for a whole adapter."""
    return nn.functional.pad(factor, (0, rank - factor.shape[1]))


def truncate(b: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Returns the best approximation of b v^T with a given rank.

    Args:
        b: (rows, ranks); v: (cols, ranks).

    Returns:
        Factors (rows, k) and (cols, k) fp32, k at most ``rank``, and the Frobenius norm of the rest over that of b v^T.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_v, r_v = torch.linalg.qr(v.double())
    left, s, right = torch.linalg.svd(r_b @ r_v.T)
    root = s[:rank].sqrt()
    whole = float(s.square().sum())
    error = (float(s[rank:].square().sum()) / whole) ** 0.5 if whole else 0.0
    k = len(root)
    return (q_b @ left[:, :k] * root).float(), (q_v @ right[:k].T * root).float(), error


def _factors(handle: ProbeHandle, member: Member) -> tuple[Tensor, Tensor]:
    """Returns factors, (rows, ranks) and (cols, ranks) fp32 on the CPU, of the member's delta since it was patched."""
    config = handle.config
    cpu = torch.device("cpu")
    spec = FactorSpec(member.parameter.tensor_id, member.extent, choose_backend(cpu).backend, cpu)
    if member.b is None or (member.storage.mergeable and not config.keep_factors):
        why = "it is moved in place" if member.b is None else "patch the model with keep_factors=True"
        raise ValueError(f"the factors of {member.name!r} were not kept: {why}")
    parts: dict[int, tuple[Tensor, Tensor]] = {}
    for window, kept in handle.history:
        if member.name in kept:
            parts[window] = kept[member.name][0], handle.estimator.right(spec, window)[0].T
    if handle.window is not None and bool(member.b.any()):
        assert member.v is not None
        b, v = member.b[0].cpu(), member.v[0].T.float().cpu()
        parts[handle.window] = (parts[handle.window][0] + b, v) if handle.window in parts else (b, v)
    pairs = list(parts.values())
    if member.past is not None:
        pairs.append((member.past.b.cpu(), member.past.v.T.cpu()))
    none = [torch.zeros(n, 0, dtype=torch.float32, device="cpu") for n in member.extent[1:]]
    return torch.cat([none[0], *(b for b, _ in pairs)], 1), torch.cat([none[1], *(v for _, v in pairs)], 1)


def _current(member: Member) -> Tensor:
    """The weight with what was learned since the last merge, in its dtype."""
    p = member.storage.load(member.device)
    if member.b is None:
        return p
    delta = member.b if member.v is None else member.b @ member.v.float()
    base = p.float() if member.gain is None else p.float() * member.gain
    return (base + delta.view(p.shape)).to(p.dtype)


def _is_layer(member: Member) -> bool:
    return member.parameter.layout.form == "matrix" and all(layer_kind(owner) is not None for owner in member.owners)


def _is_linear(owner: Owner) -> bool:
    if own_parameters(owner.module).get("weight") is None:
        return False
    return layer_kind(dataclasses.replace(owner, attribute="weight")) in ("linear", "transposed")
