"""Training on a stream: a dataset of which nothing but a batch and a small buffer is in memory, here of a local file.
Run: python examples/streaming.py [steps]; it needs datasets and no network, its model comes with lozo_kernels."""

import json
import sys
import tempfile
from pathlib import Path

from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def collate(rows):
    """A batch of texts, and its labels."""
    batch = dict(tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


with tempfile.TemporaryDirectory() as folder:
    path, (reviews, _) = Path(folder) / "reviews.jsonl", language.reviews(seed=0, train=2000, dev=0)
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    stream = load_dataset("json", data_files=str(path), split="train", streaming=True, cache_dir=folder)
    optimizer = LOZO(model, lr=3e-4, eps=1e-3, rank=2, interval=50)
    loader = DataLoader(stream.shuffle(seed=0, buffer_size=200).take(16 * steps), batch_size=16, collate_fn=collate)
    for step, batch in enumerate(loader):  # a batch is drawn before its step: all evaluations have the same
        loss = optimizer.step(lambda batch=batch: model(**batch).loss)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.4f}")
    optimizer.handle.restore()
