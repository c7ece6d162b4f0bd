"""Which slot each token of a batch is at: requests say it, and the model runner says whose tokens are where."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.overriding import Overrides
from .factors import Factors
from .options import KEY


@dataclasses.dataclass(frozen=True)
class Where:
    """Where rows of a batch are: the slot, the direction and the scale of each, (rows,) int64, int64 and fp32."""

    slots: Tensor
    directions: Tensor
    scales: Tensor

    def rows(self, rows: slice | Tensor) -> Where:
        """Some of the rows."""
        return Where(self.slots[rows], self.directions[rows], self.scales[rows])


class Tokens:
    """Where the tokens of the forward pass are that runs now, in storage that does not move.

    Args:
        most: the most tokens of a batch.

    Attributes:
        moved: some request of this batch is not at rest.
    """

    def __init__(self, factors: Factors, most: int, device: torch.device) -> None:
        self._factors, self._device = factors, device
        slots, directions = (torch.zeros(most, dtype=torch.int64, device=device) for _ in range(2))
        self._all = Where(slots, directions, torch.zeros(most, dtype=torch.float32, device=device))
        self._head: Where | None = None
        self.moved = False

    def write(self, slots: np.ndarray[Any, Any], head: Tensor | None = None) -> None:
        """Says the slot of each token; the rest of the batch, padding, is at rest.

        Args:
            head: the tokens whose logits are computed after the forward pass.
        """
        known = self._factors.slots
        worst = int(slots.max(initial=0))
        if worst >= len(known):
            raise RuntimeError(f"a request is at point {worst}, and the engine has {len(known) - 1} now")
        moved, self.moved = self.moved, worst > 0
        if moved or worst > 0:
            factor = self._factors.config.perturb_factor
            table = (np.array([d for d, _ in known]), np.array([s * factor for _, s in known], dtype=np.float32))
            values = slots, *(column[slots] for column in table)
            for own, value in zip((self._all.slots, self._all.directions, self._all.scales), values, strict=True):
                own.zero_()
                own[: len(slots)] = torch.from_numpy(value).to(self._device)
        self._head = None if head is None else self._all.rows(head)

    def of(self, count: int) -> Where:
        """The first rows of the batch."""
        if count <= len(self._all.slots):
            return self._all.rows(slice(count))
        raise RuntimeError(f"a module ran on {count} rows, and a batch has at most {len(self._all.slots)} tokens")

    def of_head(self, count: int) -> Where:
        """The rows whose logits are computed now."""
        if self._head is not None and len(self._head.slots) >= count:
            return self._head.rows(slice(count))
        if not self.moved:
            return self._all.rows(torch.zeros(count, dtype=torch.int64, device=self._device))
        raise RuntimeError("logits are computed of rows that belong to no token of the batch")

    @contextlib.contextmanager
    def head_rows(self, first: int, count: int) -> Iterator[None]:
        """While the body runs, logits are those of some tokens of the batch in order."""
        before, self._head = self._head, self._all.rows(slice(first, first + count))
        try:
            yield
        finally:
            self._head = before


class Asked:
    """What a request asks for.

    Attributes:
        slot: the slot that it is at.
        key: by which its score is known; None if it is not scored.
        first: the first token of the prompt whose loss counts, at least 1.
        seen: tokens that are scored already; a request that was preempted runs again from its start.
    """

    def __init__(self, extra: Any) -> None:
        own = (extra or {}).get(KEY) or {}
        self.slot = int(own.get("slot", 0))
        self.key: int | None = own.get("key")
        self.first = int(own.get("first", 1))
        self.seen = 0


class Runner(abc.ABC):
    """Follows one kind of model runner.

    Attributes:
        scores: (sum of -log p, tokens) by key, of requests that ask for it.
    """

    def __init__(self, runner: Any, tokens: Tokens) -> None:
        self._runner, self._tokens = runner, tokens
        self._asked: dict[str, Asked] = {}
        self.scores: dict[int, tuple[float, int]] = {}

    @abc.abstractmethod
    def install(self, overrides: Overrides) -> None:
        """Puts what it needs into the runner."""

    def _note(self, scheduled: Any) -> None:
        for new in scheduled.scheduled_new_reqs:
            self._asked[new.req_id] = Asked(getattr(new.sampling_params, "extra_args", None))
        for done in scheduled.finished_req_ids:
            self._asked.pop(done, None)

    def _slots(self, requests: Any, counts: Any) -> np.ndarray[Any, Any]:
        slots = np.array([self._asked[r].slot if r in self._asked else 0 for r in requests], dtype=np.int64)
        return slots.repeat(np.asarray(counts)[: len(slots)])

    def _of_part(self, logits_of: Any, hidden: Tensor) -> Any:
        """The function that makes logits, for views of the batch's hidden states: where a view begins says whose its rows are."""

        @functools.wraps(logits_of)
        def call(part: Tensor, *args: Any, **kwargs: Any) -> Any:
            first = (part.data_ptr() - hidden.data_ptr()) // (hidden.stride(0) * hidden.element_size())
            with self._tokens.head_rows(first, len(part)):
                return logits_of(part, *args, **kwargs)

        return call

    def _score(self, asked: Asked, hidden: Tensor, first: int, position: int, count: int, prompt: Any, logits_of: Any) -> None:
        """Adds the losses of a piece of a prompt.

        Args:
            hidden: of the whole batch; first: the row of the piece's first token; position: where that is in the prompt.
        """
        start = max(position, asked.seen, asked.first - 1)
        stop = min(position + count, len(prompt) - 1)
        asked.seen = max(asked.seen, position + count)
        if start >= stop:
            return
        row = first + start - position
        targets = torch.tensor(list(prompt[start + 1 : stop + 1]), dtype=torch.int64, device=hidden.device)
        with self._tokens.head_rows(row, stop - start):
            logits = logits_of(hidden[row : row + stop - start])
        if logits is None:
            return  # another rank has them
        logs = torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])
        total = -float(logs.double().sum())
        assert asked.key is not None
        before, tokens = self.scores.get(asked.key, (0.0, 0))
        self.scores[asked.key] = before + total, tokens + stop - start


class RunnerV1(Runner):
    """``vllm.v1.worker.gpu_model_runner``, which machines without a GPU run too."""

    def install(self, overrides: Overrides) -> None:
        runner = self._runner
        update, prepare, prompts = runner._update_states, runner._prepare_inputs, runner._get_prompt_logprobs_dict  # noqa: SLF001

        @functools.wraps(update)
        def _update_states(scheduled: Any) -> Any:
            self._note(scheduled)
            return update(scheduled)

        @functools.wraps(prepare)
        def _prepare_inputs(scheduled: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            found = prepare(scheduled, counts, *args, **kwargs)
            self._tokens.write(self._slots(runner.input_batch.req_ids, counts), found[0])
            return found

        @functools.wraps(prompts)
        def _get_prompt_logprobs_dict(hidden: Tensor, counts: dict[str, int]) -> Any:
            self._score_all(hidden, counts)
            with self._logits_of_views(hidden):
                return prompts(hidden, counts)

        for name, function in (
            ("_update_states", _update_states),
            ("_prepare_inputs", _prepare_inputs),
            ("_get_prompt_logprobs_dict", _get_prompt_logprobs_dict),
        ):
            overrides.put(runner, name, function)

    def _score_all(self, hidden: Tensor, counts: dict[str, int]) -> None:
        runner = self._runner
        for request in runner.input_batch.req_ids:
            asked = self._asked.get(request)
            if asked is None or asked.key is None or request not in counts:
                continue
            state = runner.requests[request]
            row = runner.query_start_loc.np[runner.input_batch.req_id_to_index[request]].item()
            computed = state.num_computed_tokens
            with self._head_without_adapters():
                self._score(asked, hidden, row, computed, counts[request], state.prompt_token_ids, runner.model.compute_logits)

    @contextlib.contextmanager
    def _head_without_adapters(self) -> Iterator[None]:
        """While the body runs, the head is without vLLM's LoRA, whose kernels for the CPU take rows of sampled tokens only."""
        model, overrides = self._runner.model, Overrides()
        base = getattr(getattr(model, "logits_processor", None), "base_layer", None)
        if base is not None:
            overrides.put(model, "logits_processor", base)
        try:
            yield
        finally:
            overrides.remove()

    @contextlib.contextmanager
    def _logits_of_views(self, hidden: Tensor) -> Iterator[None]:
        """While the body runs, logits are made of views of the batch's hidden states, which say where they begin."""
        model = self._runner.model
        if not self._tokens.moved:
            yield
            return
        compute, overrides = model.compute_logits, Overrides()

        overrides.put(model, "compute_logits", self._of_part(compute, hidden))
        try:
            yield
        finally:
            overrides.remove()


class RunnerV2(Runner):
    """``vllm.v1.worker.gpu.model_runner``, which GPUs run by default. Written from its source, and not run yet."""

    def install(self, overrides: Overrides) -> None:
        runner = self._runner
        add, prepare, worker = runner.add_requests, runner.prepare_inputs, runner.prompt_logprobs_worker
        prompts = worker.compute_prompt_logprobs

        @functools.wraps(add)
        def add_requests(scheduled: Any) -> Any:
            self._note(scheduled)
            return add(scheduled)

        @functools.wraps(prepare)
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            slots = self._slots(batch.req_ids, batch.num_scheduled_tokens)
            self._tokens.write(slots[: batch.num_tokens], batch.logits_indices)
            return batch

        @functools.wraps(prompts)
        def compute_prompt_logprobs(logits_of: Any, hidden: Tensor, batch: Any, *rest: Any) -> Any:
            return prompts(self._of_part(logits_of, hidden), hidden, batch, *rest)

        for where, name, function in (
            (runner, "add_requests", add_requests),
            (runner, "prepare_inputs", prepare_inputs),
            (worker, "compute_prompt_logprobs", compute_prompt_logprobs),
        ):
            overrides.put(where, name, function)


def runner_of(runner: Any, tokens: Tokens) -> Runner:
    """Returns what follows a model runner."""
    return RunnerV2(runner, tokens) if hasattr(runner, "prompt_logprobs_worker") else RunnerV1(runner, tokens)
