"""What a run of ``lozo-kernels finetune`` left in its folder."""

import json

_TIMED = ("step_ms", "forwards_ms", "outside", "seconds")


def metrics(folder):
    """Reads its metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def meaning(folder):
    """Reads its metrics, without what depends on the clock."""
    return [{k: v for k, v in line.items() if k not in _TIMED} for line in metrics(folder)]


def model_of(folder):
    """Reads the bytes of its weights."""
    return (folder / "model" / "model.safetensors").read_bytes()
