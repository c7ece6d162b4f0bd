"""Writes what ``test_earlier.py`` reads: journals, states and the weights that follow from them, with the package at hand.

The files here were written by version 0.1.0 at commit 6fe3f91 (``python -m python_tests.earlier.make``, with the package of that
commit on the path). They are not written anew when the code changes: a later version has to read them, or to refuse them where the
contract on bits has another version. Those of contract_2 and contract_3 are of the first commit whose contract has that version
for such a run; 6fe3f91 wrote those of contract_1 too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lozo_kernels import LOZO, MeZO
from lozo_kernels.journal import Journal

HERE = Path(__file__).parent
STEPS = 9
SAVED_AFTER = 5
IDS = torch.arange(8).view(2, 4)
RUNS = {
    "lozo_m_fused": (LOZO, {"rank": 3, "momentum": 0.9, "fuse_steps": True, "weight_decay": 0.1}),
    "lozo_stochastic": (LOZO, {"rank": 2, "rounding": "stochastic", "directions": 3, "two_sided": False, "dtype": "bfloat16"}),
    "lozo_two": (LOZO, {"rank": 2, "rounding": "stochastic", "directions": 2, "weight_decay": 0.1, "dtype": "bfloat16"}),
    "lozo_probe": (LOZO, {"rank": 2, "placement": "probe", "side": "scratch", "keep_factors": True}),
    "lozo_m_probe": (LOZO, {"rank": 4, "placement": "probe", "side": "activation", "momentum": 0.8, "weight_decay": 0.1}),
    "mezo_m": (MeZO, {"momentum": 0.5}),
}


VERSIONS = {"lozo_two": 1, "mezo_m": 1, "lozo_probe": 2, "lozo_m_fused": 3, "lozo_m_probe": 3, "lozo_stochastic": 3}
"""The version of the contract whose bits each run has now: ``main([name, ...], HERE / "contract_2")`` wrote those of version 2."""
REFUSED = [(name, 1, HERE) for name, version in VERSIONS.items() if version > 1]
REFUSED += [(name, 2, HERE / "contract_2") for name in ("lozo_m_fused", "lozo_m_probe")]
"""Runs whose files are refused now, with the version of the contract that wrote them, and where they lie."""


def folder_of(name: str) -> Path:
    """Where the files of a run lie that are read."""
    return HERE if name == "mezo_m" else HERE / f"contract_{VERSIONS[name]}"


class Net(nn.Module):
    """An embedding, a linear layer, a norm, and a head that is tied to the embedding; its weights follow from a formula."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.tensor([math.sin(1.0 + i + 0.7 * k) for k in range(p.numel())]).view(p.shape))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.linear(self.embedding(ids))))


def build(name: str, directory: Path | None = None):
    """The model and the optimiser of a run; with a folder, its journal too."""
    kind, options = RUNS[name]
    options = dict(options)
    model = Net().to(getattr(torch, options.pop("dtype", "float32")))
    optimizer = kind(model, lr=0.05, eps=0.01, seed=77, **({} if kind is MeZO else {"interval": 4}), **options)
    journal = None
    if directory is not None:
        journal = Journal.create(directory / f"{name}.journal", optimizer, about={"run": name}, overwrite=True)
    # A probe looks here where weights are used, and checks a loss that moves with them; later evaluations then count alike in a
    # run that is resumed.
    optimizer.handle.prepare(lambda: float(model(IDS).square().mean()), step=optimizer.steps_done)
    return model, optimizer, journal


def take(model: nn.Module, optimizer, steps: range) -> None:
    """Steps whose losses are made up, so that no bit depends on a forward pass; the model runs all the same."""
    for step in steps:
        evaluations = iter(range(100))

        def closure(step: int = step, evaluations=evaluations) -> float:
            model(IDS)
            return 1.0 + math.cos(3.0 * step + 1.3 * next(evaluations)) / 64

        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.step(closure)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def main(names: Sequence[str] = tuple(RUNS), folder: Path = HERE) -> None:
    """Writes everything about some runs into a folder."""
    folder.mkdir(exist_ok=True)
    saved = {}
    for name in names:
        model, optimizer, journal = build(name, folder)
        take(model, optimizer, range(SAVED_AFTER))
        entry = {"state": copy.deepcopy(optimizer.state_dict()), "weights": weights(model)}
        take(model, optimizer, range(SAVED_AFTER, STEPS))
        journal.finish()
        saved[name] = entry | {"final": weights(model)}
    torch.save(saved, folder / "states.pt")
    print(json.dumps({name: len((folder / f"{name}.journal").read_bytes()) for name in names}))


if __name__ == "__main__":
    main()
