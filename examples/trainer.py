"""The stock transformers.Trainer without a line changed: attach() has it train with forward passes only.
Run: python examples/trainer.py [steps]; it needs accelerate and no network, its model comes with lozo_kernels."""

import sys
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from lozo_kernels.hf import attach
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train, dev = (
    [tokenizer(text + language.PROMPT + language.LABEL_WORDS[label]) for text, label in reviews]
    for reviews in language.reviews(seed=0, train=1000, dev=100)
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        learning_rate=3e-4,
        per_device_train_batch_size=16,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=dev, data_collator=collator)
    attachment = attach(trainer, method="lozo-m", rank=2, interval=50)
    print("dev loss before:", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("dev loss after:", trainer.evaluate()["eval_loss"])
    attachment.restore()
