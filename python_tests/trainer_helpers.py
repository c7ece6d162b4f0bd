"""For the tests of the Trainer: tiny models, data whose labels are partly ignored, and quiet settings."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from lozo_kernels.hf import ZOArguments

VOCABULARY, LENGTH = 50, 9
OPTIONS = {"interval": 7, "rank": 2}


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        batch = default_data_collator(rows)
        self.batches.append({name: x.clone() for name, x in batch.items()})
        return batch


def tiny_llama(seed=1, **changes):
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes))


def token_rows(count, seed=4):
    """Examples of which a different number of labels counts, so that a mean of means is not the mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: i % 6] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def arguments(folder, cls=TrainingArguments, **changes):
    """Quiet settings for 16 examples a step."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "logging_steps": 10,
    }
    return cls(**settings | changes)


def zo_arguments(folder, **changes):
    return arguments(folder, ZOArguments, **OPTIONS | {"zo_seed": 3} | changes)


def trained(model):
    """Weights without the parameter of a driven model."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if n != "projected_gradient.value"}


def apart(a, b):
    """The largest difference between the weights of two models."""
    a, b = trained(a), trained(b)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)
