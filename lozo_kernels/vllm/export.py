"""Brings what an engine learned to the Hugging Face checkpoint: whole weights, or an adapter."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import EngineError
from ..journal import replay
from .handle import EngineHandle


def checkpoint_model(handle: EngineHandle) -> nn.Module:
    """Loads the Hugging Face model of an engine's checkpoint on the CPU, in the engine's dtype."""
    about = handle.checkpoint
    kind: Any = type(handle.model)
    trusted = about["trust_remote_code"]
    model = kind.from_pretrained(about["model"], revision=about["revision"], dtype=about["dtype"], trust_remote_code=trusted)
    return model.eval()  # type: ignore[no-any-return]


def checkpoint_weights(handle: EngineHandle) -> dict[str, Tensor]:
    """The checkpoint's weights by all names of the parameters."""
    return {name: p.detach() for name, p in checkpoint_model(handle).named_parameters(remove_duplicate=False)}


def tuned_model(handle: EngineHandle, journal: Path) -> nn.Module:
    """The Hugging Face model with what a run has learned so far."""
    model = checkpoint_model(handle)
    replay(model, journal)
    return model


def save(handle: EngineHandle, journal: Path, folder: Path) -> None:
    """Writes the tuned model with configuration and tokenizer."""
    model: Any = tuned_model(handle, journal)
    model.save_pretrained(folder)
    if not handle.llm.llm_engine.model_config.skip_tokenizer_init:
        handle.llm.get_tokenizer().save_pretrained(folder)


def export_lora(handle: EngineHandle, folder: Path) -> None:
    """Writes the factors of all linear layers as an adapter of PEFT."""
    from safetensors.torch import save_file

    learned = handle.learned()
    decayed = next((name for name, own in learned.items() if "gain" in own), None)
    if decayed is not None:
        raise EngineError(f"{decayed!r} has decayed, which no adapter can express: save() the weights")
    tensors: dict[str, Tensor] = {}
    targets, ranks, lost = set(), {}, []
    for name, own in learned.items():
        kind, stem = handle.places[name][0], name.removesuffix(".weight")
        if "b" not in own or kind not in ("linear", "head"):
            if any(bool(own[key].any()) for key in ("delta", "b") if key in own):
                lost.append(name)
            continue
        tensors[f"base_model.model.{stem}.lora_A.weight"] = own["v"].contiguous()
        tensors[f"base_model.model.{stem}.lora_B.weight"] = own["b"].contiguous()
        targets.add(stem.rpartition(".")[2])
        ranks[stem] = own["v"].shape[0]
    if not tensors:
        raise EngineError("nothing that was trained is a linear layer, and an adapter has nothing else: save() the weights")
    if lost:
        warnings.warn(f"an adapter has no place for {len(lost)} parameters that were trained, e.g. {lost[0]!r}", stacklevel=3)
    most = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": handle.checkpoint["model"],
        "r": most,
        "lora_alpha": most,
        "rank_pattern": {stem: rank for stem, rank in ranks.items() if rank != most},
        "alpha_pattern": {stem: rank for stem, rank in ranks.items() if rank != most},
        "target_modules": sorted(targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
