"""Brings what an engine learned to the Hugging Face checkpoint: whole weights, or an adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import EngineError
from ..journal import replay
from ..model.probe.lora import AdapterBuilder, LoraAdapter, widened
from ..model.storage import layer_kind
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
    learned = handle.learned()
    decayed = next((name for name, own in learned.items() if "gain" in own), None)
    if decayed is not None:
        raise EngineError(f"{decayed!r} has decayed, which no adapter can express: save() the weights")
    layers = [p for p in handle.trained if all(layer_kind(owner) in ("linear", "transposed") for owner in p.storage.owners)]
    if not layers:
        raise EngineError("nothing that was trained is a linear layer, and an adapter has nothing else: save() the weights")
    lost = [p.name for p in handle.trained if p not in layers and any(bool(t.any()) for t in _moved(learned[p.name]))]
    if lost:
        warnings.warn(f"an adapter has no place for {len(lost)} parameters that were trained, e.g. {lost[0]!r}", stacklevel=3)
    rank, builder = max(len(learned[p.name]["v"]) for p in layers), AdapterBuilder(handle.model)
    for p in layers:
        own = learned[p.name]
        for owner in p.storage.owners:
            builder.add_layer(owner, widened(own["b"], rank), widened(own["v"].T, rank))
    config = builder.config(handle.checkpoint["model"], rank) | {"task_type": "CAUSAL_LM"}
    LoraAdapter(config, builder.tensors, {}).save(folder)


def _moved(own: dict[str, Tensor]) -> list[Tensor]:
    """What is not zero if a parameter learned something."""
    return [own[key] for key in ("delta", "b") if key in own]
