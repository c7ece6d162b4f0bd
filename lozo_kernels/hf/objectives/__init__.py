"""What is minimised, and how it is scored: a head, label words, options, answers or language modelling."""

from __future__ import annotations

from ...errors import InputError
from ..tasks import Task
from .base import IGNORED, Batch, ClassObjective, Encoded, Objective, Totals
from .head import ClassificationObjective, ImageObjective
from .lm import LanguageModelObjective
from .options import AnswerObjective, ChoiceObjective, OptionsObjective
from .prompted import PromptedObjective
from .words import MaskedPromptObjective, PromptObjective

OBJECTIVES: dict[str, type[Objective]] = {
    o.name: o
    for o in (
        ClassificationObjective,
        PromptObjective,
        MaskedPromptObjective,
        ChoiceObjective,
        AnswerObjective,
        LanguageModelObjective,
        ImageObjective,
    )
}

_NEEDS_CLASSES = (ClassificationObjective.name, PromptObjective.name, MaskedPromptObjective.name)


def choose_objective(name: str, task: Task, causal: bool, masked: bool = False) -> str:
    """The name of the objective for "auto", as the papers do it.

    That is label words on causal models, and on masked ones where the task has a prompt for them, otherwise a head; for tasks
    without classes what the row of the task says.

    Args:
        name: as asked for.
        causal, masked: what the model was saved as.

    Raises:
        InputError: task, model and objective do not go together.
    """
    if task.kind == "image" and name in ("auto", ImageObjective.name):
        return ImageObjective.name
    if task.kind == "image" or name == ImageObjective.name:
        raise InputError(f"--objective {name} does not go with the task {task.name}")
    if name != "auto":
        if name in _NEEDS_CLASSES and task.kind != "classification":
            raise InputError(f"--objective {name} needs a task with classes, and {task.name} has none")
        if name not in OBJECTIVES:
            raise InputError(f"--objective {name!r} is not known; there are {', '.join(OBJECTIVES)}")
        return name
    if task.kind == "classification":
        if causal and task.prompt:
            return PromptObjective.name
        return MaskedPromptObjective.name if masked and task.masked else ClassificationObjective.name
    if not causal and task.kind != "causal_lm":
        raise InputError(f"the task {task.name} needs a causal language model, and this model is none")
    return task.objective


__all__ = [
    "IGNORED",
    "OBJECTIVES",
    "AnswerObjective",
    "Batch",
    "ChoiceObjective",
    "ClassObjective",
    "ClassificationObjective",
    "Encoded",
    "ImageObjective",
    "LanguageModelObjective",
    "MaskedPromptObjective",
    "Objective",
    "OptionsObjective",
    "PromptObjective",
    "PromptedObjective",
    "Totals",
    "choose_objective",
]
