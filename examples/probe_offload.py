"""Training a model whose weights accelerate keeps elsewhere: a probe only reads them while they are brought in.
Run: python examples/probe_offload.py [steps]; it needs accelerate and no network, its model comes with lozo_kernels."""

import sys
import tempfile

import torch
from accelerate import disk_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train, _ = language.reviews(seed=0, train=1000, dev=1)
with tempfile.TemporaryDirectory() as folder:
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    optimizer = LOZO(model, placement="probe", lr=3e-4, eps=1e-3, rank=2, interval=50)
    for step in range(steps):
        reviews = [train[(16 * step + i) % len(train)] for i in range(16)]
        texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = optimizer.step(lambda batch=batch, labels=labels: model(**batch, labels=labels).loss)
        if step == 0:
            print(optimizer.handle.report())  # where each perturbation enters, and why
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.4f}")
    optimizer.handle.restore()  # the last window is merged into the files
