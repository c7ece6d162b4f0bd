"""Everything that is measured on a GPU, in one command: ``python -m bench.gpu``, or ``make bench-gpu``.

Stages (bench/stages.py) run one after the other within a budget of time, correctness first; a stage that fails or hangs stops no
other, but without correctness there are no figures. Results, logs, plots and summary.json go to one folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import runner, stages, summary
from lozo_kernels.kernels.backends.triton.tilesizes import slug

ROOT = Path(__file__).resolve().parent.parent
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Runs the stages; 0, 1 if one failed, 2 for a wrong command line or without a GPU."""
    start = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of results (default: bench/results/ and the name of the device)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (default: 9)")
    parser.add_argument("--only", help="names of stages, separated by commas (default: all)")
    parser.add_argument("--smoke", action="store_true", help="all stages end to end on tiny CPU tensors: the figures mean nothing")
    options = parser.parse_args(argv)
    if not options.smoke and not torch.cuda.is_available():
        print("python -m bench.gpu: error: torch sees no GPU here; --smoke tries the stages on the CPU", file=sys.stderr)
        return EXIT_BAD_INPUT
    found = machine("cpu" if options.smoke else "cuda")
    output = (options.output or default_output(found["device"])).resolve()
    chosen = choose_stages(options, found, output.relative_to(ROOT) if output.is_relative_to(ROOT) else output)
    if chosen is None:
        print(f"python -m bench.gpu: error: --only {options.only} names a stage that there is not", file=sys.stderr)
        return EXIT_BAD_INPUT
    output.mkdir(parents=True, exist_ok=True)
    document = {**found, "command": shlex.join(["python", "-m", "bench.gpu", *argv]), "smoke": options.smoke}

    def save(records: list[runner.Record]) -> None:
        """Writes the summary after every stage, so that a run that is stopped leaves one of what it did."""
        last = records[-1]
        reason = f": {last['reason']}" if last["reason"] else ""
        print(f"{last['stage']}: {last['status']}, {last['seconds']:.1f} s{reason}", file=sys.stderr, flush=True)
        (output / "summary.json").write_text(json.dumps(summarise(document, records, output), indent=2) + "\n")

    records = runner.run_stages(
        chosen,
        output,
        seconds=60 * options.minutes - (time.monotonic() - start),
        root=ROOT,
        environment=subprocess_environment(),
        after_each=save,
    )
    print(summary.table(summarise(document, records, output)))
    return EXIT_FAILED if any(r["status"] == stages.FAILED for r in records) else 0


def choose_stages(options: argparse.Namespace, found: dict[str, Any], output: Path) -> list[stages.Stage] | None:
    """Returns the stages that the options ask for, or None if they name one that does not exist."""
    capability = found.get("gpu", {}).get("capability")
    chosen = (
        stages.smoke_stages(output) if options.smoke else stages.gpu_stages(output, capability=capability, name=found["device"])
    )
    if options.only is None:
        return chosen
    names = set(options.only.split(","))
    return [stage for stage in chosen if stage.name in names] if names <= {stage.name for stage in chosen} else None


def summarise(document: dict[str, Any], records: list[runner.Record], output: Path) -> dict[str, Any]:
    """Adds the stages that were run and the goals that were met to the document."""
    documents = summary.load_documents(records, output)
    return document | {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "backends": {stage: d["backend"] for stage, d in documents.items() if "backend" in d},
        "stages": [portable(r, output) for r in records],
        "targets": [] if document["smoke"] else summary.judge(documents),
        "note": "a smoke run: these figures mean nothing" if document["smoke"] else None,
    }


def machine(device: str) -> dict[str, Any]:
    """Returns device, versions and commit. Another process finds them: a CUDA context here would take memory."""
    code = "import json, torch; from lozo_kernels.bench.document import where; "
    code += f"print(json.dumps(where(torch.device({device!r}), [])))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=subprocess_environment(), stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    # The build comes later, so these are not yet those of the figures.
    return {key: value for key, value in found.items() if key not in ("backend", "isa")}


def default_output(device_name: str) -> Path:
    """Returns a folder named after the device, or for a smoke run one that git ignores."""
    if device_name == "cpu":
        return ROOT / "runs" / "bench-smoke"
    return ROOT / "bench" / "results" / slug(device_name)


def subprocess_environment() -> dict[str, str]:
    """Returns this process's variables, with the clone first on the path, no network, and Triton's kernels compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    return environment | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def portable(record: runner.Record, output: Path) -> runner.Record:
    """Makes a record whose command names no path of this machine."""
    places = {sys.executable: "python", str(output): "OUTPUT", str(ROOT): "."}

    def word(text: str) -> str:
        for path, name in places.items():
            text = text.replace(path, name)
        return text

    return record | {"command": shlex.join(word(w) for w in record["command"])}


if __name__ == "__main__":
    sys.exit(main())
