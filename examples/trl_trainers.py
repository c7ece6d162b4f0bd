"""TRL's SFTTrainer and DPOTrainer without a line changed: attach() has them train with forward passes only.
Run: python examples/trl_trainers.py [steps]; it needs trl and no network, its model comes with lozo_kernels."""

import sys
import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lozo_kernels.hf import attach
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer = AutoTokenizer.from_pretrained(MODEL)
reviews, words = language.reviews(seed=0, train=500, dev=0)[0], language.LABEL_WORDS
answers = [{"prompt": text + language.PROMPT, "completion": words[label]} for text, label in reviews]
pairs = [{"prompt": text + language.PROMPT, "chosen": words[label], "rejected": words[1 - label]} for text, label in reviews]
rates = {"learning_rate": 3e-4, "lr_scheduler_type": "constant", "per_device_train_batch_size": 16}
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": steps}
for kind, config, rows in ((SFTTrainer, SFTConfig, answers), (DPOTrainer, DPOConfig, pairs)):
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            AutoModelForCausalLM.from_pretrained(str(MODEL), dtype="float32"),
            args=config(folder, max_steps=steps, **rates, **quiet),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        attachment = attach(trainer, method="lozo", rank=2, interval=50)
        trainer.train()
        attachment.restore()
        print(f"{kind.__name__}: mean loss of {steps} steps {trainer.state.log_history[0]['loss']}")
