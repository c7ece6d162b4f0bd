"""What a run of ``lozo-kernels finetune`` left in its folder."""

import json

_TIMED = ("step_ms", "forwards_ms", "outside", "seconds")


def metrics(folder):
    """The lines of its metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def meaning(folder):
    """Its metrics without what the clock said."""
    return [{k: v for k, v in line.items() if k not in _TIMED} for line in metrics(folder)]


def model_of(folder):
    """The bytes of its weights."""
    return (folder / "model" / "model.safetensors").read_bytes()
