"""A journal of a run: a few bytes a step, from which the base model becomes the tuned one again, in every bit.
Run: python examples/journal.py [steps]; it needs no network, its model comes with lozo_kernels."""

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language
from lozo_kernels.journal import Journal, replay, verify

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer, reviews = AutoTokenizer.from_pretrained(MODEL), language.reviews(seed=0, train=1000, dev=0)[0]


def base():
    """The model that the run starts from."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()


def loss_of(model, step):
    """Of the examples of a step."""
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews[16 * step : 16 * step + 16]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "run.journal"
    tuned = base()
    optimizer = LOZO(tuned, lr=3e-4, eps=1e-3, rank=2, interval=50, momentum=0.9)
    with Journal.create(path, optimizer):  # after a kill: Journal.resume(path, optimizer), which returns the step to go on with
        for step in range(steps):
            loss = optimizer.step(lambda step=step % 62: loss_of(tuned, step))
    optimizer.handle.restore()
    print(f"loss {loss:.4f} after {steps} steps, a journal of {path.stat().st_size} bytes")
    print(f"half of the run again: {replay(base(), path, upto=steps // 2).steps} steps")
    print("the tuned model is what the journal says:", verify(base(), path, tuned).good)
