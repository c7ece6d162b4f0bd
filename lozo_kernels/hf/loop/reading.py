"""What steps left on a device, read where nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...optim.steps import StepInfo
from ..measure import Stopwatch
from ..trainer.prospects import Prospects, Rising
from .drivers import StepResult
from .records import MetricsLog, StepRecord


class StepReader:
    """Turns what steps left on the device into records: at once on the CPU, every few steps elsewhere, since reading waits.

    Args:
        log: takes the records.
        bar: a progress bar of tqdm.
        judges: look at every record.
    """

    def __init__(self, log: MetricsLog, bar: Any, device: torch.device, judges: Sequence[Prospects | Rising]) -> None:
        self.log, self._bar, self._judges = log, bar, judges
        self._every = 1 if device.type == "cpu" else 10
        self._waiting: list[tuple[StepInfo | StepResult, float, Stopwatch]] = []

    def add(self, info: StepInfo | StepResult, lr: float, watch: Stopwatch) -> None:
        """Takes what a step saw, its learning rate and its times."""
        self._waiting.append((info, lr, watch))
        if len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Writes what is waiting; an interrupt loses no step and writes none twice."""
        record = None
        while self._waiting:
            info, lr, watch = self._waiting.pop(0)
            record = StepRecord(
                step=info.step,
                loss=float(info.loss),
                c=info.c.tolist(),
                lr=lr,
                step_ms=1e3 * watch.seconds("step"),
                forwards_ms=1e3 * watch.seconds("forwards"),
                skipped=bool(info.skipped),
            )
            self.log.add_step(record)
            for judge in self._judges if not record.skipped else ():
                judge.look(record.step, record.loss, record.c, lr)
            self._bar.update()
        if record is not None:
            values = {"loss": f"{record.loss:.4f}"}
            if record.c:
                values["c"] = f"{sum(record.c) / len(record.c):+.2e}"
            values |= {"ms/step": f"{record.step_ms:.1f}", "outside forwards": f"{record.outside:.0%}"}
            if self.log.skipped:
                values["skipped"] = str(self.log.skipped)
            self._bar.set_postfix(values, refresh=False)
