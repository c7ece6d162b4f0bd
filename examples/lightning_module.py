"""A module of Lightning in which one line is changed, the optimiser: the loop of its Trainer makes forward passes only.
Run: python examples/lightning_module.py [steps]; it needs lightning and no network, its model comes with lozo_kernels."""

import sys

import lightning
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
tokenizer = AutoTokenizer.from_pretrained(MODEL)


def collate(reviews):
    """A batch for the model, which computes the loss of it."""
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Tuned(lightning.LightningModule):  # noqa: D101
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").train()

    def training_step(self, batch, _):
        self.log("loss", loss := self.model(**batch).loss)
        return loss

    def configure_optimizers(self):
        return LOZO(self.model, lr=3e-4, eps=1e-3, drive="backward")


data = DataLoader(language.reviews(seed=0, train=1000, dev=0)[0], batch_size=16, shuffle=True, collate_fn=collate)
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
(trainer := lightning.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", **quiet)).fit(Tuned(), data)
print(f"loss of step {trainer.global_step}: {trainer.callback_metrics['loss']:.4f}")
