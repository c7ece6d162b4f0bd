"""Fine-tuning an image classifier on a folder of images, a folder for each class, as `lozo-kernels finetune` does it.
Run: python examples/vision.py [steps]; it needs no network: it draws its images, and its tiny ViT is random."""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.settings import Settings

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for i in range(300):  # bars that lie or stand, in noise
        pixels = torch.rand(8, 8) * 120
        lying = i % 2 == 0
        pixels[(i // 2) % 8 if lying else slice(None), slice(None) if lying else (i // 2) % 8] = 255
        path = folder / "images" / ("train" if i < 240 else "dev") / ("lying" if lying else "standing") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.byte().numpy()).save(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, initializer_range=0.15)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    # The same on the command line: lozo-kernels finetune --task images --data-dir ... --model ...
    settings = {"model": str(folder / "model"), "task": "images", "data_dir": str(folder / "images"), "lr": 1e-3, "rank": 4}
    summary = finetune(Settings(**settings, steps=steps, batch_size=32, interval=10, output=str(folder / "run")), quiet=True)
    print(f"dev loss {summary['loss_before']:.4f} -> {summary['loss_after']:.4f}")
    print(f"dev accuracy {summary['accuracy_before']:.0%} -> {summary['accuracy_after']:.0%}")
