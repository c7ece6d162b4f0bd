"""Training without gradients in the Trainer of transformers."""
