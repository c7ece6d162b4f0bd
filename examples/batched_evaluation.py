"""Both evaluations of two directions in one forward pass, which reads the weights once: for few tokens.
Run: python examples/batched_evaluation.py [steps]; it needs no network, its model comes with lozo_kernels."""

import sys

from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train, _ = language.reviews(seed=0, train=1000, dev=1)
calls = []


def losses(batch):
    """A loss for each example; the examples come once for every evaluation, one after the other."""
    calls.append(len(batch["input_ids"]))
    logits = model(**batch).logits[:, :-1].float()
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    summed = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100).sum(1)
    return summed, (labels != -100).sum(1)  # sums over tokens and how many they are of


optimizer = LOZO(model, placement="probe", evaluation="batched", directions=2, lr=3e-4, eps=1e-3, rank=2)
for step in range(steps):
    reviews = [train[(4 * step + i) % len(train)] for i in range(4)]
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    loss = optimizer.step(losses, dict(tokenizer(texts, return_tensors="pt", padding=True)))
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss:.4f}, {calls[-1]} examples in the last forward pass")
optimizer.handle.restore()
