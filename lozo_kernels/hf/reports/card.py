"""The model card of a tuned model: a README.md that says what it is, how it came to be and how to have it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import require
from ...model.files import write_whole
from ...model.text_table import markdown_table, mebibytes, number
from ..methods import METHODS
from ..objectives import OBJECTIVES, ImageObjective, Objective

_PAPERS = {
    "lozo": "Chen et al., *Enhancing zeroth-order fine-tuning for language models with low-rank structures*, ICLR 2025",
    "mezo": "Malladi et al., *Fine-tuning language models with just forward passes*, NeurIPS 2023",
    "agzo": "Lin et al., *AGZO: Activation-guided zeroth-order optimization for LLM fine-tuning*, ICML 2026",
    "subzero": "Yu et al., *Zeroth-order fine-tuning of LLMs in random subspaces*, 2024",
    "zo-muon": "Lang et al., *Powering up zeroth-order training via subspace gradient orthogonalization*, arXiv 2602.17155",
}
_SETTINGS = ("lr", "lr_schedule", "batch_size", "weight_decay", "momentum", "dtype", "max_length")


def write_card(folder: Path, summary: dict[str, Any], metrics: Sequence[str] = ()) -> Path:
    """Writes README.md beside a saved model.

    Args:
        folder: where the model was saved.
        summary: what :func:`lozo_kernels.hf.reports.summary.summarize` returned of its run.
        metrics: names of the metrics that the task has.

    Returns:
        The file. Its header is what the Hub reads: library, base model, tags, data sets and metrics.
    """
    path, hub = folder / "README.md", require("huggingface_hub")
    header = hub.ModelCardData(**_metadata(summary, metrics)).to_yaml()
    write_whole(path, str(hub.ModelCard(f"---\n{header}\n---\n\n{_body(summary)}")))
    return path


def _metadata(summary: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    base = summary["settings"]["model"]
    values: dict[str, Any] = {"library_name": "peft" if summary["settings"].get("peft") else "transformers"}
    if base is not None and not Path(base).exists():
        values["base_model"] = base
    values["pipeline_tag"] = OBJECTIVES[summary["objective"]].pipeline
    values["tags"] = ["lozo_kernels", summary["method"]]
    if METHODS[summary["method"]].kind == "zeroth-order":
        values["tags"].insert(1, "zeroth-order-optimization")
    dataset = re.match(r"the Hub: ([^\s:,]+)", summary["data"]["source"])
    if dataset is not None:
        values["datasets"] = [dataset[1]]
    if metrics and summary["accuracy_after"] is not None:
        values["metrics"] = list(metrics)
    return values


def _body(s: dict[str, Any]) -> str:
    settings, method, data = s["settings"], METHODS[s["method"]], s["data"]
    base = settings["model"]
    name = Path(s["output"]).name
    origin = "The small model that lozo_kernels carries"
    if base is not None:
        origin = f"`{Path(base).name if Path(base).exists() else base}`"
    passes = ", with forward passes only" if method.kind == "zeroth-order" else ""
    parts = [
        f"# {name}",
        f"{origin}, tuned on {s['task'] or 'a file of the user'} ({s['objective']}) by {method.label} with "
        f"[lozo_kernels](https://pypi.org/project/lozo-kernels/){passes}.",
    ]
    paper = _PAPERS.get(s["method"].removesuffix("-m"))
    if paper:
        parts.append(f"Method: {paper}.")
    if s["stopped"] is not None:
        parts.append(f"The run stopped early, after {s['steps_done']} of {settings['steps']} steps: {s['stopped']}.")
    parts += [
        "## Results",
        _results(s),
        f"On {data['dev_examples']} dev examples; trained on {data['train_examples']}. Data: {_source(data['source'])}.",
        "## Training",
        _training(s, [n for n in ("rank", "interval", "eps", "directions", "scaling", "placement") if n in method.uses]),
        *(f"Note: {note}." for note in s["notes"]),
        "## How to load",
        _loading(name, OBJECTIVES[s["objective"]], peft=bool(settings.get("peft"))),
    ]
    if s["command"]:
        parts += [
            "## How to have it again",
            f"```\n{s['command']}\n```",
            "The noise is the same bits on every device; forward passes differ by rounding between devices and versions.",
        ]
    return "\n\n".join(parts) + "\n"


def _results(s: dict[str, Any]) -> str:
    rows = [[f"dev loss per {s['loss_unit']}", *(number(s[f"loss_{when}"], ".4f") for when in ("before", "after"))]]
    if s["accuracy_before"] is not None:
        rows.append(["dev accuracy", *(number(s[f"accuracy_{when}"], ".1%") for when in ("before", "after"))])
    scores = dict((s.get("test") or {}).get("metrics", {}))
    return markdown_table(
        ["", "before", "after"], rows + [[f"test {n}", "", f"{value:.4g}"] for n, value in scores.items()], left=3
    )


def _training(s: dict[str, Any], own: list[str]) -> str:
    settings = s["settings"]
    rows: list[tuple[str, Any]] = [("steps", s["steps_done"])]
    rows += [(n.replace("_", " "), settings[n]) for n in (*own, *_SETTINGS) if settings.get(n) is not None]
    rows += [
        ("seed", s["seed"]),
        ("parameters", f"{s['parameters']:,} ({s['trained_parameters']:,} trained)"),
        ("peak memory of training", mebibytes(s["training_peak_bytes"], ",.1f", " MiB")),
        ("peak memory of inference", mebibytes(s["inference_peak_bytes"], ",.1f", " MiB")),
        ("time per step", number(s["step_ms"], ".1f", " ms")),
        ("device", s["device"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in s["versions"].items() if v)),
        ("commit", s["commit"]),
    ]
    return markdown_table(["", ""], [[name, str(value)] for name, value in rows if value is not None], left=2)


def _loading(name: str, objective: type[Objective], *, peft: bool) -> str:
    auto, images = objective.auto_model, objective is ImageObjective
    reader, variable = ("AutoImageProcessor", "processor") if images else ("AutoTokenizer", "tokenizer")
    what = "the folder with this file" + (": an adapter, for which peft has to be installed" if peft else "")
    return "\n".join(
        [
            "```python",
            f"from transformers import {', '.join(sorted((auto, reader)))}",
            "",
            f'model = {auto}.from_pretrained("{name}")  # {what}',
            f'{variable} = {reader}.from_pretrained("{name}")',
            "```",
        ]
    )


def _source(source: str) -> str:
    """The source of the data with the names of files only, not where they lie on the machine of the run."""
    return ", ".join(Path(part).name if "/" in part and Path(part).exists() else part for part in source.split(", "))
