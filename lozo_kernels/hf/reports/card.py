"""The model card of a tuned model: a README.md that says what it is, how it came to be and how to have it again."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..methods import METHODS

_PAPERS = {
    "lozo": "Chen et al., *Enhancing zeroth-order fine-tuning for language models with low-rank structures*, ICLR 2025",
    "mezo": "Malladi et al., *Fine-tuning language models with just forward passes*, NeurIPS 2023",
    "subzero": "Yu et al., *Zeroth-order fine-tuning of LLMs in random subspaces*, 2024",
}
_AUTO = {
    "image": ("image-classification", "AutoModelForImageClassification", "AutoImageProcessor"),
    "classification": ("text-classification", "AutoModelForSequenceClassification", "AutoTokenizer"),
    "masked": ("fill-mask", "AutoModelForMaskedLM", "AutoTokenizer"),
}
_CAUSAL = ("text-generation", "AutoModelForCausalLM", "AutoTokenizer")
_SETTINGS = ("lr", "lr_schedule", "batch_size", "weight_decay", "momentum", "dtype", "max_length")


def write_card(folder: Path, summary: dict[str, Any], metrics: Sequence[str] = ()) -> Path:
    """Writes README.md beside a saved model.

    Args:
        folder: where the model was saved.
        summary: of its run, see :func:`lozo_kernels.hf.reports.summary.summarize`.
        metrics: names of those that the task has.

    Returns:
        The file. Its header is what the Hub reads: library, base model, tags, data sets and metrics.
    """
    path = folder / "README.md"
    path.write_text(f"---\n{_header(_metadata(summary, metrics))}\n---\n\n{_body(summary)}", encoding="utf-8")
    return path


def _metadata(summary: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    base = summary["settings"]["model"]
    values: dict[str, Any] = {"library_name": "transformers"}
    if base is not None and not Path(base).exists():
        values["base_model"] = base
    values["pipeline_tag"] = _auto(summary)[0]
    values["tags"] = ["lozo_kernels", summary["method"]]
    if METHODS[summary["method"]].kind == "zeroth-order":
        values["tags"].insert(1, "zeroth-order-optimization")
    dataset = re.match(r"the Hub: ([^\s:,]+)", summary["data"]["source"])
    if dataset is not None:
        values["datasets"] = [dataset[1]]
    if metrics and summary["accuracy_after"] is not None:
        values["metrics"] = list(metrics)
    return values


def _header(values: dict[str, Any]) -> str:
    """YAML: by the Hub's own library if it is there, else in the part of YAML that is JSON."""
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import ModelCardData

        return str(ModelCardData(**values).to_yaml()).strip()
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items())


def _body(s: dict[str, Any]) -> str:
    settings, method = s["settings"], METHODS[s["method"]]
    base = settings["model"]
    name = Path(s["output"]).name
    origin = (
        "the small model that lozo_kernels carries" if base is None else f"`{Path(base).name if Path(base).exists() else base}`"
    )
    data = s["data"]
    task = s["task"] or "a file of the user"
    lines = [
        f"# {name}",
        "",
        f"{origin[0].upper()}{origin[1:]}, tuned on {task} ({s['objective']}) by {method.label} with "
        "[lozo_kernels](https://pypi.org/project/lozo-kernels/)"
        + (", with forward passes only." if method.kind == "zeroth-order" else "."),
    ]
    paper = _PAPERS.get(s["method"].split("-")[0])
    if paper:
        lines += ["", f"Method: {paper}."]
    if s["stopped"] is not None:
        lines += ["", f"The run stopped early, after {s['steps_done']} of {settings['steps']} steps: {s['stopped']}."]
    lines += ["", "## Results", "", "| | before | after |", "|---|---|---|"]
    lines.append(f"| dev loss per {s['loss_unit']} | {_number(s['loss_before'])} | {_number(s['loss_after'])} |")
    if s["accuracy_before"] is not None:
        lines.append(f"| dev accuracy | {_percent(s['accuracy_before'])} | {_percent(s['accuracy_after'])} |")
    lines += [f"| test {name} | | {value:.4g} |" for name, value in _test_scores(s).items()]
    lines += ["", f"On {data['dev_examples']} dev examples; trained on {data['train_examples']}. Data: {_source(data['source'])}."]
    lines += ["", "## Training", "", "| | |", "|---|---|"]
    used = [*(n for n in ("rank", "interval", "eps", "directions", "scaling", "placement") if n in method.uses), *_SETTINGS]
    rows: list[tuple[str, Any]] = [("steps", s["steps_done"])]
    rows += [(n.replace("_", " "), settings[n]) for n in used if settings.get(n) is not None]
    rows += [
        ("seed", s["seed"]),
        ("parameters", f"{s['parameters']:,} ({s['trained_parameters']:,} trained)"),
        ("peak memory of training", _mebibytes(s["training_peak_bytes"])),
        ("peak memory of inference", _mebibytes(s["inference_peak_bytes"])),
        ("time per step", "-" if s["step_ms"] is None else f"{s['step_ms']:.1f} ms"),
        ("device", s["device"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in s["versions"].items() if v)),
        ("commit", s["commit"]),
    ]
    lines += [f"| {name} | {value} |" for name, value in rows if value is not None]
    lines += [f"\nNote: {note}." for note in s["notes"]]
    _, auto, reader = _auto(s)
    lines += [
        "",
        "## How to load",
        "",
        "```python",
        f"from transformers import {', '.join(sorted((auto, reader)))}",
        "",
        f'model = {auto}.from_pretrained("{name}")  # the folder with this file',
        f'{"processor" if "Image" in reader else "tokenizer"} = {reader}.from_pretrained("{name}")',
        "```",
    ]
    if s["command"]:
        lines += ["", "## How to have it again", "", "```", s["command"], "```", ""]
        lines += ["The noise is the same bits on every device; forward passes differ by rounding between devices and versions."]
    return "\n".join(lines) + "\n"


def _test_scores(summary: dict[str, Any]) -> dict[str, float]:
    return dict((summary.get("test") or {}).get("metrics", {}))


def _auto(summary: dict[str, Any]) -> tuple[str, str, str]:
    return _AUTO.get(summary["objective"], _CAUSAL)


def _source(source: str) -> str:
    """Names of files, not where they lie on the machine of the run."""
    return ", ".join(Path(part).name if "/" in part and Path(part).exists() else part for part in source.split(", "))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1%}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f} MiB"
