"""Work in other processes: a test file once for each rank, or a function in a fork that may be killed; and what they report."""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from python_tests.machine import wait_until

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(script, ranks, folder, *, torchrun=False, seconds=240.0):
    """Runs ``python script RANK RANKS FOLDER`` for each rank; returns what each saved in ``FOLDER/RANK.pt``. Fails with their logs.

    Args:
        torchrun: set the variables that torchrun sets, whose own process would only cost time.
        seconds: that they may take on an idle machine.
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
        wait_until(lambda: all(process.poll() is not None for process in started), seconds)
        codes = [process.returncode for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-4000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def forked(function: Callable[[], None], enough: Callable[[], bool] = lambda: False, seconds: float = 120.0) -> bool:
    """Runs a function in a process of its own, which is killed as soon as ``enough()``. Returns whether it came to its end.

    Args:
        seconds: how long it may take on an idle machine.

    Raises:
        RuntimeError: it failed, or hangs.
    """
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended: list[int] = []

    def come_to_an_end() -> bool:
        done, status = os.waitpid(child, os.WNOHANG)
        ended.extend([status] if done else [])
        return bool(done)

    waited = wait_until(lambda: come_to_an_end() or enough(), seconds, poll=0.0005)
    if ended:
        if ended[0]:
            raise RuntimeError(f"the run failed with status {ended[0]}")
        return True
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not waited:
        raise RuntimeError("the run hangs")
    return False


def refusals_of(*actions):
    """Returns the messages of those actions that were refused. A process of a test cannot fail it and reports them instead."""
    said = (_refusal(action) for action in actions)
    return [words for words in said if words is not None]


def _refusal(action):
    try:
        action()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None
