"""Runs a test file as several processes, one for each rank."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(script, ranks, folder, *, torchrun=False, timeout=240):
    """What each of ``python script RANK RANKS FOLDER`` saved in ``FOLDER/RANK.pt``; fails with the ends of their logs.

    Args:
        torchrun: with the variables that torchrun sets, whose own process would only cost time.
    """
    logs, started = [folder / f"{rank}.log" for rank in range(ranks)], []
    try:
        for rank, log in enumerate(logs):
            environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            if torchrun:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            command = [sys.executable, str(Path(script).resolve()), str(rank), str(ranks), str(folder)]
            with log.open("w") as file:
                started.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment))
        codes = [process.wait(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-4000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
