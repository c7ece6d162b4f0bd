"""Where the processes of a run meet: on one machine at addresses that no other machine reaches."""

from __future__ import annotations

import datetime
import os
import socket

from torch import distributed

_LOOPBACK = "127.0.0.1"
_PORT = "lozo_kernels/port"
_PATIENCE = datetime.timedelta(minutes=30)  # as torch.distributed has it for gloo


def join(rank: int, size: int) -> None:
    """Makes this process a member of the default group, which talks by gloo.

    Gloo and torch's store listen on all addresses, and take what anybody sends. If torchrun says that all processes are on this
    machine, they listen on the loopback device only; torchrun's own store is not theirs.
    """
    device = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size) or "MASTER_ADDR" not in os.environ or device is None:
        distributed.init_process_group("gloo")
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", device)  # for groups that are made later too
    distributed.init_process_group("gloo", store=_store(rank, size), rank=rank, world_size=size)


def _store(rank: int, size: int) -> distributed.Store:
    """The store of this group, which the first process serves: at the port that was agreed on, or, where a store of torchrun has
    that port, at one that the first process tells the others through it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    theirs = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        theirs, port = distributed.TCPStore(address, port, is_master=False, timeout=_PATIENCE), 0
    key = f"{_PORT}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank:
        port = port or int(theirs.get(key))  # type: ignore[union-attr]
        return distributed.TCPStore(_LOOPBACK, port, size, is_master=False, timeout=_PATIENCE)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((_LOOPBACK, port))
    listening.listen()
    port, served = listening.getsockname()[1], listening.detach()
    own = distributed.TCPStore(
        _LOOPBACK, port, size, is_master=True, timeout=_PATIENCE, wait_for_workers=False, master_listen_fd=served
    )
    if theirs is not None:
        theirs.set(key, str(port))
    return own
