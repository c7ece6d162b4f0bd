"""LOZO in a plain loop: a closure returns the loss at the weights as they are, and nothing calls backward.
Run: python examples/plain_loop.py [steps]; it needs no network, its model comes with lozo_kernels."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train, dev = language.reviews(seed=0, train=1000, dev=200)


def batch_of(reviews):
    """Reviews that end in the answer to the task's question."""
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


optimizer = LOZO(model, lr=3e-4, eps=1e-3, rank=2, interval=50)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
held_out = batch_of(dev)
with torch.no_grad():
    print(f"dev loss before: {model(**held_out).loss:.4f}")
for step in range(steps):
    batch = batch_of([train[(16 * step + i) % len(train)] for i in range(16)])
    loss = optimizer.step(lambda batch=batch: model(**batch).loss)
    schedule.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss:.4f}")
optimizer.handle.restore()  # the model is yours again
with torch.no_grad():
    print(f"dev loss after: {model(**held_out).loss:.4f}")
