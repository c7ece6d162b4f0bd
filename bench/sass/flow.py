"""The path that a thread takes through a full tile: which blocks, and how often.

Loops are strongly connected components, entered at one block and left by any. A path never takes a loop's way back; instead the
loop is one step of it with a number of trips. Of all paths the one is taken that moves most bytes of the weights and then,
"longest", has most instructions: an upper bound, so that a branch for odd cases cannot hide work. "shortest" has fewest, in
favour of code whose slow branches are rarely taken (the argument reductions of sin and cos).
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .program import Block

Score = tuple[float, float]
"""Bytes of the weights that are moved, and instructions (negative on the shortest path)."""


@dataclasses.dataclass
class Loop:
    """A loop on a path.

    Attributes:
        path: one trip.
        trips: None until someone finds out.
    """

    path: Path
    trips: int | None = None


@dataclasses.dataclass
class Path:
    """Blocks by position, and loops, in order."""

    steps: list[int | Loop]

    def loops(self) -> Iterator[Loop]:
        """Yields all loops, outer before inner."""
        for step in self.steps:
            if isinstance(step, Loop):
                yield step
                yield from step.path.loops()

    def visits(self) -> Counter[int]:
        """Counts how often every block is run; a loop of unknown length once."""
        found: Counter[int] = Counter()
        for step in self.steps:
            if isinstance(step, Loop):
                trips = 1 if step.trips is None else step.trips
                for block, count in step.path.visits().items():
                    found[block] += trips * count
            else:
                found[step] += 1
        return found


def heaviest_path(blocks: Sequence[Block], moved: Callable[[Block], float], *, longest: bool = True) -> Path:
    """Finds the heaviest path from the first block to an end of the program.

    Args:
        moved: bytes of the weights that a block loads and stores.
    """
    sign = 1 if longest else -1
    scores = [(moved(b), float(sign * len(b.instructions))) for b in blocks]
    edges = [list(b.successors) for b in blocks]
    ends = {i for i, b in enumerate(blocks) if b.ends}
    found = _best(set(range(len(blocks))), 0, ends, edges, scores)
    if found is None:
        raise ValueError("no path leads to an end of the program")
    return found[1]


def _best(nodes: set[int], start: int, goals: set[int], edges: list[list[int]], scores: list[Score]) -> tuple[Score, Path] | None:
    """Finds the path with the best score from ``start`` to a goal inside ``nodes``; edges back to ``start`` are not taken."""
    inside = {n: [m for m in edges[n] if m in nodes and m != start] for n in nodes}
    components = _components(start, inside)
    of = {n: i for i, component in enumerate(components) for n in component}
    best: dict[int, tuple[Score, list[int | Loop]]] = {}  # by the block where a component is entered
    # Components come after all that they lead to.
    for component in components:
        entries = {m for n in of for m in inside[n] if m in component and of[n] != of[m]} | ({start} & component)
        for entry in entries:
            options = _options(component, entry, goals, inside, edges, scores, best)
            if options:
                best[entry] = max(options, key=operator.itemgetter(0))
    return (best[start][0], Path(best[start][1])) if start in best else None


def _options(
    component: set[int],
    entry: int,
    goals: set[int],
    inside: dict[int, list[int]],
    edges: list[list[int]],
    scores: list[Score],
    best: dict[int, tuple[Score, list[int | Loop]]],
) -> list[tuple[Score, list[int | Loop]]]:
    """Lists the ways from ``entry`` through its component and on to a goal."""
    looping = len(component) > 1 or entry in inside[entry]
    steps: list[int | Loop]
    if looping:
        latches = {n for n in component if entry in edges[n]}
        trip = _best(component, entry, latches, edges, scores)
        if trip is None:
            return []
        score, steps = trip[0], [Loop(trip[1])]
    else:
        score, steps = scores[entry], [entry]
    options = []
    for n in component:
        if n in goals:
            options.append((score, list(steps)))
        for m in inside[n]:
            if m not in component and m in best:
                rest, after = best[m]
                options.append(((score[0] + rest[0], score[1] + rest[1]), [*steps, *after]))
    return options


def _components(start: int, edges: dict[int, list[int]]) -> list[set[int]]:
    """Lists the strongly connected components reached from ``start``, each after all that it leads to (Tarjan, no recursion)."""
    index: dict[int, int] = {start: 0}
    low = {start: 0}
    stack, on_stack = [start], {start}
    work = [(start, iter(edges[start]))]
    components = []
    while work:
        node, successors = work[-1]
        for successor in successors:
            if successor not in index:
                index[successor] = low[successor] = len(index)
                stack.append(successor)
                on_stack.add(successor)
                work.append((successor, iter(edges[successor])))
                break
            if successor in on_stack:
                low[node] = min(low[node], index[successor])
        else:
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
            if low[node] == index[node]:
                component: set[int] = set()
                while node not in component:
                    component.add(stack.pop())
                on_stack -= component
                components.append(component)
    return components
