"""ZOTrainer: a Trainer whose arguments are the method's, and which can minimise what has no gradient, here an error rate.
Run: python examples/zo_trainer.py [steps]; it needs accelerate and no network, its model comes with lozo_kernels."""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from lozo_kernels.hf import ZOArguments, ZOTrainer
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train = [tokenizer(t + language.PROMPT + language.LABEL_WORDS[y]) for t, y in language.reviews(seed=0, train=1000, dev=1)[0]]


def error_rate(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Share of reviews whose last token, the answer, the model would not have written: a step function of the weights."""
    guesses = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(-1)
    row, last = torch.arange(len(guesses)), inputs["attention_mask"].sum(1) - 1
    return (guesses[row, last - 1] != inputs["input_ids"][row, last]).float().mean()


with tempfile.TemporaryDirectory() as folder:
    settings = {"method": "lozo", "rank": 2, "interval": 50, "eps": 1e-2, "placement": "probe"}
    run = {"output_dir": folder, "max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": max(1, steps // 5)}
    trainer = ZOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL),
        ZOArguments(**settings, **run, **quiet),
        train_dataset=train,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_objective=error_rate,
    )
    trainer.train()
    trainer.restore()
