"""A loop written for back-propagation, unchanged: loss.backward() and optimizer.step() take forward passes only.
Run: python examples/backward_loop.py [steps]; it needs no network, its model is random."""

import sys

import torch
from transformers import OPTConfig, OPTForCausalLM

from lozo_kernels import LOZO

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = OPTForCausalLM(OPTConfig(**sizes, vocab_size=128, max_position_embeddings=64, dropout=0.0, init_std=0.1))
optimizer = LOZO(model, lr=1e-3, eps=1e-3, rank=4, interval=50, drive="backward")
schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

start = torch.randint(3, 100, (16, 1))
ids = start + torch.arange(12)  # the model learns to count
model.train()  # in train mode a call makes both evaluations of the step
for step in range(steps):
    loss = torch.tensor(0.0)
    for part in ids.chunk(2):  # accumulation works as ever
        partial = model(input_ids=part, labels=part).loss / 2
        partial.backward()
        loss = loss + partial.detach()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 50 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss:.4f}")
assert all(p.grad is None for name, p in model.named_parameters() if "projected_gradient" not in name)
optimizer.handle.restore()
