"""What the demo is asked."""

from __future__ import annotations

import dataclasses

from ...bench.models import MODELS
from ..command_line import option


@dataclasses.dataclass(frozen=True)
class Demo:
    """Settings of ``lozo-kernels demo``, whose ``--help`` says what each means."""

    output: str = option("runs/demo", "folder for the run and the picture; what an earlier demo left there is replaced")
    steps: int = option(800, "of the small model", low=2)
    architecture: str = option("opt-125m", "whose step is timed, with random weights", choices=tuple(MODELS), hidden=True)
    seed: int = option(0, "of the run", low=0, high=2**63 - 1)
