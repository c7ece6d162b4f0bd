"""What a step evaluates: losses of tokens, rewards of what the engine writes."""

import asyncio
import warnings

import pytest
import torch
from vllm import SamplingParams

from lozo_kernels.errors import EngineError
from lozo_kernels.vllm import LOZO, engine_options, nll, rewards

from .engines import EPS, engine, loss_of, losses_at, reference, texts

POINTS = [(0, 0.0), (0, EPS), (0, -EPS), (1, EPS)]


class Words:
    """A tokenizer whose words are numbers."""

    bos_token_id = eos_token_id = pad_token_id = None

    def encode(self, text, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def served(models):
    with engine(models("llama")) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=2)
        yield optimizer
        optimizer.remove()


def test_only_completions_count(models, served, monkeypatch):
    monkeypatch.setattr(served.handle.llm, "get_tokenizer", Words)
    model = reference(models("llama"))
    pairs = [("5 6 7", "8 9 10 11"), ("20", "30 31")]
    total = 0.0
    for prompt, completion in pairs:
        before = Words().encode(prompt)
        ids = torch.tensor([before + Words().encode(completion, False)])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        total -= sum(float(logs[i - 1, ids[0, i]]) for i in range(len(before), ids.shape[1]))
    found = losses_at(served.handle, nll(pairs), [(0, 0.0)])[0, 0.0]
    assert abs(found - total / 6) < 1e-6
    whole = losses_at(served.handle, nll([f"{a} {b}" for a, b in pairs]), [(0, 0.0)])[0, 0.0]
    assert abs(whole - loss_of(model, [Words().encode(f"{a} {b}") for a, b in pairs])) < 1e-6


def test_texts_that_cannot_be_scored_are_named(served):
    for bad, message in (([[7]], "text 0 has 1 tokens"), ([[3, 4], [5] * 300], "text 1 has 300 tokens")):
        with pytest.raises(ValueError, match=message):
            served.step(nll(bad))
    for bad in ([], [7], [None]):
        with pytest.raises(TypeError, match="nll"):
            nll(bad)
    with pytest.raises(TypeError, match="objective"):
        served.step(lambda: 1.0)


def completions(optimizer, prompts, params, points):
    """What the engine writes at each point."""
    seen = {}
    objective = rewards(prompts, params, lambda prompt, text: 0.0)
    objective._scores = lambda pairs: [0.0] * len(pairs)
    generate = optimizer.handle.llm.generate

    def spy(some, given, **options):
        outputs = generate(some, given, **options)
        for output, one in zip(outputs, given, strict=True):
            slot = one.extra_args["lozo_kernels"]["slot"]
            point = optimizer.handle._slots[slot - 1]
            seen.setdefault(point, []).append([list(o.token_ids) for o in output.outputs])
        return outputs

    optimizer.handle.llm.generate = spy
    try:
        losses_at(optimizer.handle, objective, points)
    finally:
        del optimizer.handle.llm.generate
    return seen


def sampling(**options):
    return SamplingParams(**{"max_tokens": 12, "temperature": 1.0, "detokenize": False, "ignore_eos": True} | options)


def test_all_points_see_the_same_random_numbers(served):
    """The points differ, their random numbers do not; a second call is the same, and another step is not."""
    prompts = texts(3, count=6)
    near = completions(served, prompts, sampling(), [(0, 0.0), (0, 1e-7)])
    assert near[0, 0.0] == near[0, 1e-7]
    far = completions(served, prompts, sampling(), [(0, 0.3), (0, -0.3)])
    assert far[0, 0.3] != far[0, -0.3]
    assert far == completions(served, prompts, sampling(), [(0, 0.3), (0, -0.3)])
    several = completions(served, prompts, sampling(n=3), [(0, 0.0)])[0, 0.0]
    assert all(len(row) == 3 and row[0] != row[1] for row in several)


def test_points_in_a_batch_write_what_each_writes_alone(served):
    prompts = texts(4, count=5)
    points = [(0, 0.3), (0, -0.3), (1, 0.3), (0, 0.0)]
    together = completions(served, prompts, sampling(temperature=0.0), points)
    for point in points:
        alone = completions(served, prompts, sampling(temperature=0.0), [point])
        assert alone[point] == together[point]


def test_rewards_are_means_and_failures_leave_prompts_out(served):
    prompts = texts(5, count=3)

    def score(prompt, text):
        if prompt == prompts[1]:
            raise ValueError("no answer")
        return 2.0 if prompt == prompts[0] else 5.0

    async def later(prompt, text):
        await asyncio.sleep(0.001)
        return score(prompt, text)

    for one in (score, later):
        with pytest.warns(UserWarning, match="1 of 3 prompts"):
            found = losses_at(served.handle, rewards(prompts, sampling(max_tokens=2), one), [(0, EPS), (0, -EPS)])
        assert found == {(0, EPS): -3.5, (0, -EPS): -3.5}

    def never(prompt, text):
        raise ValueError("no answer")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(EngineError, match="no prompt"):
            losses_at(served.handle, rewards(prompts, sampling(max_tokens=2), never), [(0, EPS)])
    with pytest.raises(TypeError, match="score"):
        rewards(prompts, sampling(), "x")


def test_options_are_checked():
    with pytest.raises(ValueError, match="points"):
        engine_options(points=0)
    with pytest.raises(ValueError, match="rank"):
        engine_options(rank=0)
