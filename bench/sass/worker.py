"""A process that compiles and reads kernels: a line of JSON in, a line of JSON out. Started by pool.py."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from .facts import Facts
from .targets import TARGETS


def main() -> None:
    """Serves requests until stdin ends."""
    # Compilers print; only answers may go to the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _answer(request: dict[str, Any]) -> Any:
    # Triton takes seconds to import, and its environment must be clean by then.
    from .compiler import compilations, describe, read

    listed = compilations(request["catalogue"], request["vendor"])
    if request["do"] == "list":
        return [describe(c, request["vendor"]) for c in listed]
    try:
        facts = read(listed[request["index"]], TARGETS[request["target"]])
    except Exception as error:  # whatever the compiler raises is a finding about this kernel
        facts = Facts(broken=f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:2000])
    return dataclasses.asdict(facts)


if __name__ == "__main__":
    main()
