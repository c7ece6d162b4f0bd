"""Makes the embedded model: ``python -m bench.pretrain_demo OUTPUT`` (some five minutes).

Ordinary backpropagation with AdamW on stories of visits: what was good or bad there, and how the visitor reacted. They also hold
questions about the weather, answered at random by yes or no, but never the question of the task; its reviews are not among them.
The words are those of ``lozo_kernels/hf/demo/language.py``. The committed folder ``lozo_kernels/hf/demo/model`` is its output
at the default settings.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lozo_kernels.hf.demo.language import DAYS, LABEL_WORDS, PLACE_TRAITS, PLACES, opinion

VOCABULARY = 640
BLOCK = 64
BATCH = 32

NAMES = ("Mia", "Leo", "Anna", "Tom", "Nora", "Sam", "Ella", "Ben", "Ruth", "Max", "Ida", "Paul")
WEATHER = ("raining", "snowing", "windy", "sunny", "cold outside", "warm outside", "foggy")

GLAD = (
    "smiled all the way home",
    "told {friend} to go there soon",
    "planned to come back the next week",
    "thanked everyone twice",
    "was happy for the rest of the day",
    "left a big tip",
    "could not wait to return",
    "wrote a letter full of praise",
)
SORRY = (
    "frowned all the way home",
    "told {friend} to stay away",
    "asked for the money back",
    "left before the end",
    "was angry for the rest of the day",
    "hurried out of the door",
    "never went there again",
    "wrote a letter full of complaints",
)


def story(rng: random.Random) -> str:
    """One short story: a visit and its visitor's reaction, or a talk about the weather."""
    name, friend = rng.sample(NAMES, 2)
    if rng.random() < 0.25:
        question = f"{name} asked {friend} on {rng.choice(DAYS)}: is it {rng.choice(WEATHER)}?"
        return f"{question} {rng.choice(('yes', 'no'))}, said {friend}."
    place = rng.choice(list(PLACES))
    good = rng.random() < 0.5
    opening = f"{name} went to the {rng.choice(PLACE_TRAITS)} {place} on {rng.choice(DAYS)}."
    reaction = rng.choice(GLAD if good else SORRY).format(friend=friend)
    return f"{opening} {opinion(rng, place, good)} {name} {reaction}."


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer: any text can be encoded, and the words of the stories are mostly one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """Makes an untrained Llama of some 280,000 parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=80,
        intermediate_size=216,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def blocks(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Puts all texts in a row, each with its <s>, and cuts that into rows of BLOCK tokens."""
    ids = [i for row in tokenizer(list(texts))["input_ids"] for i in row]
    return torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)


def pretrain(output: Path, *, stories: int = 20_000, steps: int = 3_000, lr: float = 3e-3, seed: int = 0) -> float:
    """Trains and saves the model; returns the loss per token on stories that it has not read."""
    torch.set_num_threads(1)  # so that the result does not depend on how many there are
    torch.manual_seed(seed)
    rng = random.Random(seed)
    texts = [story(rng) for _ in range(stories)]
    tokenizer = train_tokenizer(texts)
    for word in LABEL_WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, f"{word!r} is not one token"
    rows = blocks(tokenizer, texts)
    held_out, rows = rows[:100], rows[100:]
    model = build_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {rows.numel():,} tokens", file=sys.stderr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    start = time.perf_counter()
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", file=sys.stderr)
    with torch.no_grad():
        final = float(model.eval()(input_ids=held_out, labels=held_out).loss)
    print(f"held-out loss {final:.4f}", file=sys.stderr)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return final


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description="pretrain the embedded model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pretrain(args.output, steps=args.steps, seed=args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
