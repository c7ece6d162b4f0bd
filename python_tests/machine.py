"""Limits of waiting that follow the machine.

A test that waits for another process or thread gives it a limit, so that a hang fails and does not stop everything. Limits are
written in seconds of a machine that does nothing else. How much slower this one is right now is measured when a limit is needed.
"""

import subprocess
import sys
import time

_IDLE = 1.5  # seconds that the process of slowness() takes on an idle machine
_MARGIN = 2.0  # what the load may still grow by between a measurement and the end of the wait


def slowness():
    """Measures how many times longer a process with torch takes to start now than on an idle machine; at least 1."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(1.0, (time.perf_counter() - start) / _IDLE)


def stretched(seconds):
    """Converts seconds of an idle machine to seconds of this one, for a limit that must be known beforehand. Takes a while."""
    return _MARGIN * slowness() * seconds


def wait_until(done, seconds=60.0, poll=0.005):
    """Waits until ``done()`` is true, for so many seconds of an idle machine; returns whether it became true.

    How slow the machine is is measured only after that many seconds of this machine, so that a test that passes pays nothing.
    """
    start, limit = time.monotonic(), seconds
    while not done():
        if time.monotonic() - start > limit:
            limit = stretched(seconds)
            if time.monotonic() - start > limit:
                return False
        time.sleep(poll)
    return True
