"""Zeroth-order training of the adapters that PEFT puts into a model; the model itself stays frozen.
Run: python examples/peft_lora.py [steps]; it needs peft and no network, its model comes with lozo_kernels."""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import MeZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
base = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")).eval()
frozen = base.get_input_embeddings().weight.clone()
train, _ = language.reviews(seed=0, train=1000, dev=1)

optimizer = MeZO(model, lr=1e-3, eps=1e-3)  # only what requires a gradient is perturbed: the adapters
print("perturbed:", ", ".join(optimizer.handle.names[:4]), "...")
for step in range(steps):
    reviews = [train[(16 * step + i) % len(train)] for i in range(16)]
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = optimizer.step(lambda batch=batch, labels=labels: model(**batch, labels=labels).loss)
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss:.4f}")
assert torch.equal(frozen, base.get_input_embeddings().weight)
optimizer.handle.restore()
