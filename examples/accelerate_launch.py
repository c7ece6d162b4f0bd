"""A script for accelerate: prepare() averages the projected gradients, so that all processes make the same update.
Run: python examples/accelerate_launch.py [steps] or, for several processes, the same after accelerate launch."""

import sys

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
reviews, _ = language.reviews(seed=0, train=1000, dev=0)


def collate(reviews):
    """A batch for the model, which computes the loss of it."""
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").train()
optimizer = LOZO(model, lr=3e-4, eps=1e-3, drive="backward")  # before prepare(), which wraps the model
loader = DataLoader(reviews, batch_size=8, shuffle=True, collate_fn=collate)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for _, batch in zip(range(steps), loader, strict=False):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
sums = accelerator.gather(sum(p.detach().double().sum() for p in accelerator.unwrap_model(model).parameters()).reshape(1))
accelerator.print(f"loss {loss.item():.4f}, {len(sums)} processes, equal weights: {bool((sums == sums[0]).all())}")
accelerator.end_training()
