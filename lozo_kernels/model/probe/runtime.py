"""What all probed modules of a model share: the points to evaluate at, in storage that does not move."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import BatchSplitError
from ...kernels.calls import Draw, Step
from ..config import PatchConfig


@dataclasses.dataclass(frozen=True)
class Point:
    """The point of one evaluation: the scale along a direction of a step. Scale 0 is the unperturbed model."""

    step: Step
    direction: int
    scale: float


REST = Point(0, 0, 0.0)
"""The point without a perturbation."""


class PointTensors:
    """The points on one device: ``draws`` (groups, 2) int64, step and direction; ``scales`` (groups,) fp32 for low-rank weights.

    For each number of points there is one pair of tensors, which is written in place, so that compiled code and captured graphs
    see new values.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._take(1)

    def write(self, points: Sequence[Point], factor: float) -> None:
        """Writes the points, all of one step; ``factor`` is what multiplies eps for a low-rank weight.

        A step that is a tensor is copied on the device, and nothing is read from host memory, which a captured graph cannot do.
        """
        self._take(len(points))
        step = points[0].step
        if len(points) == 1 or isinstance(step, Tensor):
            if isinstance(step, Tensor):
                self.draws[:, 0].copy_(step, non_blocking=True)
            else:
                self.draws[:, 0].fill_(step)
            for g, point in enumerate(points):
                self.draws[g, 1].fill_(point.direction)
                self.scales[g].fill_(point.scale * factor)
            return
        pinned = self.device.type == "cuda"
        numbers = torch.tensor([(step, p.direction) for p in points], dtype=torch.int64, device="cpu", pin_memory=pinned)
        scales = torch.tensor([p.scale * factor for p in points], dtype=torch.float32, device="cpu", pin_memory=pinned)
        self.draws.copy_(numbers, non_blocking=True)
        self.scales.copy_(scales, non_blocking=True)

    def _take(self, count: int) -> None:
        if count not in self._kept:
            draws = torch.zeros(count, 2, dtype=torch.int64, device=self.device)
            self._kept[count] = draws, torch.zeros(count, dtype=torch.float32, device=self.device)
        self.draws, self.scales = self._kept[count]


class Runtime:
    """The current points, and whether the model differs from its stored weights.

    Attributes:
        points: one for each evaluation that shares a forward pass; one of scale 0 between steps.
        examples: the examples of each evaluation if several share a forward pass, else None.
        live: some factor or scale is not zero, so that modules have something to add.
        selected: the evaluation that a module runs for, if it runs once for each; else None.
        groups: the number of evaluations in the inputs of a module.
        parts: with directions per example, how many equal parts of the batch are each at their own, from that of the point on.
    """

    def __init__(self, config: PatchConfig) -> None:
        self.seed = config.seed
        self._factor = config.perturb_factor
        self._devices: dict[torch.device, PointTensors] = {}
        self.points: list[Point] = [REST]
        self.examples: int | None = None
        self.live = False
        self.selected: int | None = None
        self.groups = 1
        self.parts = 1
        self._per_example = config.per_example

    @contextlib.contextmanager
    def only(self, group: int) -> Iterator[None]:
        """While the body runs, modules get the part of the batch that belongs to one evaluation."""
        self.selected, self.groups = group, 1
        try:
            yield
        finally:
            self.selected, self.groups = None, len(self.points)

    def select(self, per_group: Tensor) -> Tensor:
        """The rows of a tensor, which has one row for each evaluation and perhaps more, that belong to the inputs of a module."""
        if self.selected is not None:
            return per_group[self.selected : self.selected + 1]
        return per_group if per_group.shape[0] == len(self.points) else per_group[: len(self.points)]

    def point(self, group: int) -> Point:
        """The point of one of the evaluations in the inputs of a module."""
        return self.points[group if self.selected is None else self.selected]

    def on(self, device: torch.device) -> PointTensors:
        """The points as tensors on a device."""
        if device not in self._devices:
            self._devices[device] = PointTensors(device)
            self._devices[device].write(self.points, self._factor)
        return self._devices[device]

    def write(self, points: Sequence[Point], examples: int | None = None, parts: int = 1) -> None:
        """Moves to other points. ``examples`` is the number for each of several, or of all ``parts`` together."""
        self.parts = parts
        self.points, self.examples, self.groups = list(points), examples, len(points)
        for device in self._devices.values():
            device.write(self.points, self._factor)

    def draws(self, group: int, *, dense: bool) -> list[Draw]:
        """The draw of one of the points as the ops take it; an empty list if its scale is 0. Dense directions are one for all parts
        of a batch."""
        point = self.points[group]
        direction = 0 if dense and self._per_example else point.direction
        return [Draw(point.step, direction)] if point.scale else []

    @property
    def whole(self) -> int:
        """The examples of all evaluations in the inputs of a module."""
        return self.groups * (self.examples or 1)

    def is_batch(self, shape: torch.Size) -> bool:
        """Whether a tensor's rows are the examples of all evaluations, or a multiple of them."""
        return bool(shape) and shape[0] > 0 and shape[0] % self.whole == 0

    def is_shared(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is one for all examples, and must be expanded to be one for each evaluation. Raises BatchSplitError
        if it is neither that nor made of the examples."""
        if self.is_batch(shape):
            return False
        if shape and shape[0] == 1:
            return True
        raise BatchSplitError(
            f"{name!r} gets a tensor of shape {tuple(shape)}, whose first dimension is not made of {self.groups} evaluations of "
            f"{self.examples} examples: this model cannot evaluate them in one forward pass; "
            + ("GRZO cannot train it, and LOZO can" if self._per_example else "use evaluation='sequential'")
        )
