"""What a step of an engine evaluates: losses of texts, or rewards of what the engine writes. All points share batches."""

from __future__ import annotations

import abc
import asyncio
import inspect
import math
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ..errors import EngineError
from .handle import EngineHandle
from .options import KEY

Text = str | Sequence[int] | tuple[str, str]
"""A text, its tokens, or (prompt, completion) of which the completion's tokens count."""
Score = Callable[[str, str], float | Awaitable[float]]


class Objective(abc.ABC):
    """A loss of a batch, which an engine evaluates at several points at once."""

    @abc.abstractmethod
    def evaluate(self, handle: EngineHandle, slots: Sequence[int]) -> list[tuple[float, int]]:
        """Returns (sum, weight) at each slot; their quotient is the loss."""

    @abc.abstractmethod
    def halves(self) -> list[Objective]:
        """The objective in two parts, for ``lr="auto"``. Raises ValueError if there is one example only."""


def nll(texts: Sequence[Text]) -> Objective:
    """The mean loss (negative log-likelihood) of the tokens of texts.

    Args:
        texts: strings, sequences of tokens, or pairs (prompt, completion), of which only the completion's tokens count.

    Raises:
        TypeError, ValueError: there is no text, or it is none.
    """
    return _Nll(list(texts))


def rewards(prompts: Sequence[Any], params: Any, score: Score) -> Objective:
    """Minus the mean reward of completions that the engine writes. The same random numbers are used at all points of a step.

    Args:
        prompts: as ``LLM.generate`` takes them.
        params: ``SamplingParams``; with ``n`` above 1 the mean over completions counts.
        score: returns the reward of (prompt, completion), a number; may be a coroutine function, all of which run at once. If it
            fails for some prompt, the step goes on without that prompt and warns.
    """
    if not callable(score):
        raise TypeError(f"score is a function of (prompt, completion), not {score!r:.200}")
    return _Rewards(list(prompts), params, score)


class _Nll(Objective):
    def __init__(self, texts: list[Text]) -> None:
        if not texts or not all(isinstance(text, (str, list, tuple)) or hasattr(text, "tolist") for text in texts):
            raise TypeError("nll() takes texts, lists of tokens or pairs of prompt and completion, at least one")
        self._texts = texts
        self._prompts: list[tuple[list[int], int]] | None = None

    def halves(self) -> list[Objective]:
        return [_Nll(half) for half in _halves(self._texts)]

    def evaluate(self, handle: EngineHandle, slots: Sequence[int]) -> list[tuple[float, int]]:
        from vllm import SamplingParams

        if self._prompts is None:
            self._prompts = [self._tokens(handle.llm, text, i) for i, text in enumerate(self._texts)]
        count = len(self._prompts)
        prompts, params = [], []
        for i, (tokens, first) in enumerate(self._prompts):
            for slot in slots:
                own = {"slot": slot, "first": first, "key": slot * count + i}
                prompts.append({"prompt_token_ids": tokens, "cache_salt": handle.salt(slot)})
                given: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "extra_args": {KEY: own}}
                given |= {"skip_reading_prefix_cache": True} if handle.scores_in_worker else {"prompt_logprobs": 0}
                params.append(SamplingParams(**given))
        handle.call("lozo_scores")
        outputs = handle.llm.generate(prompts, params, use_tqdm=False)
        found: dict[int, Any]
        if handle.scores_in_worker:
            found = next((scores for scores in handle.call("lozo_scores") if scores), {})
        else:
            asked = [one.extra_args[KEY] for one in params]
            found = {own["key"]: _of_prompt(out, own["first"]) for own, out in zip(asked, outputs, strict=True)}
        wanted = [len(tokens) - first for tokens, first in self._prompts]
        sums = []
        for slot in slots:
            rows = [found.get(slot * count + i) for i in range(count)]
            lost = next((i for i, row in enumerate(rows) if row is None or row[1] != wanted[i]), None)
            if lost is not None:
                raise EngineError(f"the engine did not score all tokens of text {lost}: {rows[lost]} of {wanted[lost]}")
            sums.append((math.fsum(row[0] for row in rows if row), sum(wanted)))
        return sums

    @staticmethod
    def _tokens(llm: Any, text: Text, index: int) -> tuple[list[int], int]:
        if isinstance(text, str):
            tokens, first = llm.get_tokenizer().encode(text), 1
        elif isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text):
            tokenizer = llm.get_tokenizer()
            before = tokenizer.encode(text[0])
            tokens, first = before + tokenizer.encode(text[1], add_special_tokens=False), max(1, len(before))
        else:
            tokens, first = [int(token) for token in text], 1  # type: ignore[union-attr]
        most = llm.llm_engine.model_config.max_model_len - 1
        if not first < len(tokens) <= most:
            raise ValueError(
                f"text {index} has {len(tokens)} tokens, {max(0, len(tokens) - first)} of them to score; needed are 1 to {most}"
            )
        return tokens, first


def _of_prompt(output: Any, first: int) -> tuple[float, int]:
    """The loss of a prompt's tokens, from the log-probabilities that came with them."""
    tokens = output.prompt_token_ids
    rows = [output.prompt_logprobs[i][tokens[i]].logprob for i in range(first, len(tokens))]
    return -math.fsum(rows), len(rows)


class _Rewards(Objective):
    def __init__(self, prompts: list[Any], params: Any, score: Score) -> None:
        if not prompts:
            raise ValueError("rewards() needs at least one prompt")
        self._prompts, self._params, self._score = prompts, params, score

    def halves(self) -> list[Objective]:
        return [_Rewards(half, self._params, self._score) for half in _halves(self._prompts)]

    def evaluate(self, handle: EngineHandle, slots: Sequence[int]) -> list[tuple[float, int]]:
        prompts, params = [], []
        for i, prompt in enumerate(self._prompts):
            for slot in slots:
                one = self._params.clone()
                one.seed = (
                    handle.config.seed * 1_000_003 + handle.step * 8_191 + i
                ) % 2**31  # one sequence of numbers for all points
                one.extra_args = (one.extra_args or {}) | {KEY: {"slot": slot}}
                given = (
                    {"prompt": prompt}
                    if isinstance(prompt, str)
                    else {"prompt_token_ids": prompt}
                    if isinstance(prompt, list)
                    else prompt
                )
                prompts.append({**given, "cache_salt": handle.salt(slot)})
                params.append(one)
        outputs = handle.llm.generate(prompts, params, use_tqdm=False)
        scored = self._scores([(p, completion.text) for p, output in zip(self._names(len(slots)), outputs, strict=True)
                               for completion in output.outputs])  # fmt: skip
        at = iter(scored)
        table = [[_mean([next(at) for _ in output.outputs]) for output in outputs[i : i + len(slots)]]
                 for i in range(0, len(outputs), len(slots))]  # fmt: skip
        good = [row for row in table if all(math.isfinite(value) for value in row)]
        if not good:
            raise EngineError("no prompt of the step has a score at every point")
        if len(good) < len(table):
            warnings.warn(f"{len(table) - len(good)} of {len(table)} prompts have no score at some point: left out", stacklevel=2)
        return [(-math.fsum(row[i] for row in good), len(good)) for i in range(len(slots))]

    def _names(self, times: int) -> list[Any]:
        return [prompt for prompt in self._prompts for _ in range(times)]

    def _scores(self, pairs: list[tuple[Any, str]]) -> list[float]:
        """The scores of (prompt, completion); NaN where there is none."""
        if inspect.iscoroutinefunction(self._score):
            return asyncio.run(self._gather(pairs))
        return [_scored(self._score, *pair) for pair in pairs]

    async def _gather(self, pairs: list[tuple[Any, str]]) -> list[float]:
        calls: Any = (self._score(*pair) for pair in pairs)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                warnings.warn(f"score() failed: {result!r}", stacklevel=2)
        return [math.nan if isinstance(r, BaseException) else float(r) for r in results]


def _scored(score: Any, prompt: Any, completion: str) -> float:
    """A score, NaN with a warning if there is none."""
    try:
        return float(score(prompt, completion))
    except Exception as e:
        warnings.warn(f"score() failed: {e!r}", stacklevel=2)
        return math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _halves(some: list[Any]) -> list[list[Any]]:
    if len(some) < 2:
        raise ValueError("lr='auto' needs steps of two texts or prompts, or more")
    return [some[: len(some) // 2], some[len(some) // 2 :]]
