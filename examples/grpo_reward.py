"""A reward as GRPO takes it, maximised by forward passes alone: the closure writes answers and returns their reward.
Run: python examples/grpo_reward.py [steps]; it needs no network, its model comes with lozo_kernels."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 160
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
reviews, _ = language.reviews(seed=0, train=1000, dev=0)
rows = [{"prompt": text + language.PROMPT, "answer": language.LABEL_WORDS[label]} for text, label in reviews]


def right(completions, answer, **_):
    """In the form of TRL's reward functions, so that GRPOTrainer(reward_funcs=right) takes it too."""
    return [float(text.startswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def reward(rows):
    """The mean reward of what the model, as it is, writes."""
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    written = model.generate(**batch, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    completions = tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :])
    return sum(right(completions, [row["answer"] for row in rows])) / len(rows)


optimizer = LOZO(model, lr=1e-3, eps=1e-2, rank=2, interval=50, directions=2)
for step in range(steps):
    some = [rows[(64 * step + i) % len(rows)] for i in range(64)]
    loss = optimizer.step(lambda some=some: -reward(some))  # steps minimise
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: reward {-loss:.2f}")
optimizer.handle.restore()
