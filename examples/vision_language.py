"""A vision-language model, built tiny from its configuration, learns to name the colour of a picture.
Run: python examples/vision_language.py [steps]; it needs no network, its model is random."""

import sys

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lozo_kernels import LOZO

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 400
torch.manual_seed(0)
image, words = 3, torch.tensor([4, 5, 6])  # the token that stands for a patch of a picture; red, green and blue
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
vision, text = CLIPVisionConfig(**sizes, image_size=8, patch_size=4), LlamaConfig(**sizes, vocab_size=8, initializer_range=0.1)
config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, vision_feature_layer=-1)
model = LlavaForConditionalGeneration(config).eval()


def batch_of(size):
    """Pictures of one colour in noise, each with four tokens for its patches, and the answer, which alone counts."""
    colour = torch.randint(3, (size,))
    pixels = 0.3 * torch.randn(size, 3, 8, 8)
    pixels[torch.arange(size), colour] += 1.0
    ids = torch.cat([torch.full((size, 4), image), words[colour][:, None]], dim=1)
    labels = ids.masked_fill(ids == image, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


optimizer = LOZO(model, lr=3e-3, eps=1e-3, rank=4, interval=50, directions=2)
for step in range(steps):
    batch = batch_of(32)
    loss = optimizer.step(lambda batch=batch: model(**batch).loss)
    if step % 100 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss:.4f}")
optimizer.handle.restore()
held_out = batch_of(300)
guesses = model(**held_out).logits[:, -2].argmax(-1)
print(f"right: {(guesses == held_out['input_ids'][:, -1]).float().mean():.0%}")
