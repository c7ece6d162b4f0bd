"""A model in shards: FSDP2 keeps its rows apart, each process moves its own, and all exchange losses alone.
Run: python examples/sharded.py [steps] or, for several processes, torchrun --nproc-per-node 2 examples/sharded.py [steps]."""

import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
alone = {} if "RANK" in os.environ else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **alone)
rank, ranks = distributed.get_rank(), distributed.get_world_size()
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
if torch.cuda.is_available():
    model.cuda(int(os.environ.get("LOCAL_RANK", 0)))
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
reviews = language.reviews(seed=0, train=1000, dev=0)[0][rank::ranks]  # every process has examples of its own
optimizer = LOZO(model, lr=3e-4, eps=1e-3, rank=2, interval=50, momentum=0.9)
for step in range(steps):
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in (reviews * 4)[8 * step : 8 * step + 8]]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = optimizer.step(lambda batch=batch, labels=labels: model(**batch, labels=labels).loss)
    if rank == 0 and step % 20 == 0:
        print(f"step {step}: loss {loss:.4f}, {optimizer.parallel.traffic.sent} bytes sent")
distributed.destroy_process_group()
