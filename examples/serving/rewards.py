"""Trains a model by rewards of what it writes, in a vLLM engine: a small model that writes reviews learns to praise.

    make test-vllm                       # makes .venv-vllm
    VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=. .venv-vllm/bin/python examples/vllm_rewards.py

A reward is any function of text. Here it counts words of praise and of blame, which has no gradient: the mean is near 0 at first.
"""

import random
import tempfile

import torch
import transformers
from vllm import LLM, SamplingParams

from lozo_kernels.hf.demo import MODEL, language
from lozo_kernels.vllm import LOZO, engine_options, rewards

GOOD, BAD = ({word for some in words.values() for word in some} for words in (language.GOOD, language.BAD))
WRITING = SamplingParams(max_tokens=24, temperature=1.0, stop=["."])


def praise(_prompt: str, completion: str) -> float:
    """From -1, only words of blame, to 1, only words of praise."""
    words = completion.replace(",", " ").split()
    good, bad = (sum(word in some for word in words) for some in (GOOD, BAD))
    return (good - bad) / max(1, good + bad)


def openings(rng: random.Random, count: int) -> list[str]:
    """How reviews begin; the engine writes on."""
    places, days = list(language.PLACES), language.DAYS
    return [
        f"My visit to the {rng.choice(language.PLACE_TRAITS)} {rng.choice(places)} on {rng.choice(days)}. The" for _ in range(count)
    ]


def write_model(folder: str, steps: int = 300) -> str:
    """Trains a model of 150K parameters to write reviews, with gradients, in about a minute."""
    tokenizer, rng = transformers.AutoTokenizer.from_pretrained(MODEL), random.Random(0)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=640, max_position_embeddings=64, bos_token_id=0,
                                                                   eos_token_id=1, pad_token_id=1, **shape))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        batch = tokenizer([language.review(rng)[0] for _ in range(32)], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(model: str | None = None, steps: int = 60, seed: int = 0) -> list[float]:
    """Returns the mean reward of each step, over all its points."""
    model = model or write_model(tempfile.mkdtemp())
    llm = LLM(model, dtype="float32", max_model_len=64, enforce_eager=True, seed=seed, **engine_options(rank=4, seed=seed))
    optimizer = LOZO(llm, lr=0.1, eps=2e-2, directions=8, normalise="spread")
    rng, seen = random.Random(seed), []
    for step in range(steps):
        seen.append(-float(optimizer.step(rewards(openings(rng, 16), WRITING, praise))))
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: mean reward {seen[-1]:+.2f}")
    (output,) = llm.generate(["My visit to the old cafe on Monday. The"], WRITING, use_tqdm=False)
    print(output.prompt + output.outputs[0].text)
    return seen


if __name__ == "__main__":
    main()
