"""Processes of one machine meet at addresses that no other machine reaches: gloo and torch's store take what anybody sends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch.distributed or its gloo backend is missing", allow_module_level=True)
if not Path("/proc/self/net/tcp").exists():
    pytest.skip("sockets are listed by Linux", allow_module_level=True)
pytest.importorskip("transformers")

import lozo_kernels
from python_tests.machine import stretched

SCRIPT = '''
import os
import sys
from pathlib import Path
import torch
from torch import distributed
from lozo_kernels.hf.loop.processes import joined
from lozo_kernels.hf.settings import Settings

def listening():
    """(address in hexadecimal, where it is IPv4) of every socket on which this process listens."""
    own = set()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(fd))
        except OSError:
            pass
    found = []
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].split(":")[0])
    return found

with joined(Settings(output=os.environ["OUT"])):
    total = torch.ones(1)
    distributed.all_reduce(total)
    own = listening()
    assert float(total) == 2 and set(own) <= {"0100007F"}, own
    group = distributed.new_group(backend="gloo")
    distributed.all_reduce(total, group=group)
    assert set(listening()) <= {"0100007F"}, listening()
    distributed.barrier()
sys.stdout.write("met\\n")  # one write: torchrun does not buffer, and print() makes two
'''


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(tmp_path, **more):
    root = str(Path(lozo_kernels.__file__).resolve().parents[1])
    kept = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    return kept | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")} | more


def test_processes_that_were_started_by_hand(tmp_path):
    """With the variables that torchrun, mpirun and Slurm scripts set, the first process serves the store."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = []
    for rank in "01":
        own = environment(tmp_path, **address, RANK=rank, LOCAL_RANK=rank)
        command = [sys.executable, "-c", SCRIPT]
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for process in started:
        out, err = process.communicate(timeout=stretched(120))
        assert out == "met\n", err[-2000:]


def test_processes_of_torchrun(tmp_path):
    """Their group has a store of its own beside that of torchrun, whose socket is in another process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=stretched(120))
    assert done.stdout.count("met\n") == 2, done.stderr[-3000:]


def test_several_machines_meet_as_torch_has_it(monkeypatch):
    """Then the loopback device would reach nobody."""
    from lozo_kernels.hf.loop import meeting

    called = []
    monkeypatch.setattr(meeting.distributed, "init_process_group", lambda *a, **k: called.append((a, k)))
    monkeypatch.setattr(meeting, "_store", lambda *_: pytest.fail("a store of one machine"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    meeting.join(0, 4)
    assert called == [(("gloo",), {})] and "GLOO_SOCKET_IFNAME" not in os.environ
