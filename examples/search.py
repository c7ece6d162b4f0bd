"""A learning rate and an interval found by Optuna: a trial trains for some steps, and bad ones are pruned half way.
Run: python examples/search.py [steps]; it needs optuna and no network, its model comes with lozo_kernels."""

import sys

import optuna
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lozo_kernels import LOZO, NonFiniteLossError
from lozo_kernels.hf.demo import MODEL, language

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
tokenizer = AutoTokenizer.from_pretrained(MODEL)
train, dev = language.reviews(seed=0, train=1000, dev=100)


def loss_of(model, reviews):
    """Of reviews with their answers."""
    texts = [text + language.PROMPT + language.LABEL_WORDS[label] for text, label in reviews]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True))
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


@torch.no_grad()
def trial_of(trial):
    """The dev loss after some steps with the settings of a trial."""
    settings = {"lr": trial.suggest_float("lr", 1e-6, 1e-2, log=True), "interval": trial.suggest_categorical("interval", [20, 50])}
    optimizer = LOZO(model := AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval(), eps=1e-3, **settings)
    for step in range(steps):
        reviews = [train[(16 * step + i) % len(train)] for i in range(16)]
        trial.report(float(optimizer.step(lambda reviews=reviews: loss_of(model, reviews))), step)
        if step == steps // 2 and trial.should_prune():
            raise optuna.TrialPruned
    return float(loss_of(model, dev))


study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner(n_startup_trials=3))
study.optimize(trial_of, n_trials=8, catch=(NonFiniteLossError,))
print(f"lowest dev loss {study.best_value:.4f} with {study.best_params}")
