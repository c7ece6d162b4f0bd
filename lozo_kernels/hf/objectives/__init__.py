"""What is minimised, and how it is scored: a head, label words, options, answers or language modelling."""

from __future__ import annotations

from ...errors import InputError
from ..tasks import Task
from .base import Batch, Encoded, Objective
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
    """The name of the objective that goes with a task and a model.

    "auto" does as the papers do: label words on causal models, and on masked ones where the task has a prompt for them, otherwise a
    head. For tasks without classes it is what the row of the task says.

    Args:
        name: the one that is asked for, or "auto".
        causal, masked: whether the model was saved as such a language model.

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
    "OBJECTIVES",
    "AnswerObjective",
    "Batch",
    "ChoiceObjective",
    "ClassificationObjective",
    "Encoded",
    "ImageObjective",
    "LanguageModelObjective",
    "MaskedPromptObjective",
    "Objective",
    "OptionsObjective",
    "PromptObjective",
    "PromptedObjective",
    "choose_objective",
]
