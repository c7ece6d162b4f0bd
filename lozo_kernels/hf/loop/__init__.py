"""The training loop of ``finetune``: what it drives, what it measures, and what it writes while it goes on."""
