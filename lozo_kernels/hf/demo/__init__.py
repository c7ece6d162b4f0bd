"""The embedded default: a small pretrained model, the language that it knows, and a task that it does not."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""Folder of the embedded model; ``bench/pretrain_demo.py`` in the repository made it."""
