"""An estimator from outside of the package: in place, in a probe, its journal and state, and what is refused."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, Draw, FactoredEstimator, Handle, PatchConfig, capture_step, ops, patch, register_estimator
from lozo_kernels.cli import plugin
from lozo_kernels.cli.command import main
from lozo_kernels.hf.methods import METHODS
from lozo_kernels.journal import Journal, replay
from lozo_kernels.model import config, estimators
from lozo_kernels.optim import methods as optim_methods
from python_tests.models import Zoo, same, weights, zoo_loss


class Halves(FactoredEstimator):
    """U of the noise over the rank, and a V of halves."""

    name = "halves"

    def left(self, spec, draw):
        batch, rows, _ = spec.extent
        made = ops.factor(
            self.config.seed, batch * rows, self.config.rank, spec.tensor_id, draw, device=spec.device, backend=spec.backend
        )
        return made.view(batch, rows, self.config.rank) / self.config.rank

    def right(self, spec, window):
        batch, _, cols = spec.extent
        made = ops.factor(
            self.config.seed, batch * cols, self.config.rank, spec.tensor_id, Draw(window), stream="V", backend=spec.backend
        )
        return ((made * 2).round() / 2).view(batch, cols, self.config.rank).transpose(1, 2)


@pytest.fixture(scope="module", autouse=True)
def own():
    """The optimiser; other tests do not know the estimator."""
    yield register_estimator(Halves)
    config.ESTIMATORS.remove("halves")
    config.FACTORED.remove("halves")
    del estimators.ESTIMATORS["halves"], optim_methods.OPTIMIZERS["halves"]


OPTIONS = [
    {},
    {"fuse_steps": True, "directions": 3, "momentum": 0.5, "weight_decay": 0.1},
    {"two_sided": False, "directions": 3},
    {"placement": "probe", "momentum": 0.9},
    {"placement": "probe", "evaluation": "batched", "directions": 2},
    {"placement": "probe", "evaluation": "split", "directions": 2},
]


def make(model, lr=1e-2, **options):
    return register_estimator(Halves)(model, lr=lr, eps=1e-2, rank=2, interval=3, seed=7, **options)


@pytest.mark.parametrize("options", [{}, {"placement": "probe"}], ids=str)
def test_steps_are_those_of_a_simulation_in_fp64(options):
    """c L V^T with what the class says of L and V, on materialised weights."""
    model = Zoo()
    plain = copy.deepcopy(model).double()
    optimizer, loss, plain_loss = make(model, lr=1e-3, **options), zoo_loss(model), zoo_loss(plain)
    other = patch(copy.deepcopy(model), estimator="halves", rank=2, interval=3, seed=7)
    for step in range(7):
        optimizer.step(loss)
        directions = {name: other.materialize(name, step).double() for name in other.names}
        base, sides = weights(plain), []
        for scale in (1e-2, -1e-2, 0.0):
            with torch.no_grad():
                for name, d in directions.items():
                    c = (sides[0] - sides[1]) / 2e-2 if scale == 0.0 else 0.0
                    plain.get_parameter(name).copy_(base[name] + (scale - 1e-3 * c) * d)
                sides.append(float(plain_loss()))
        rounding = 64 * 2.0**-24 * sides[0] / 1e-2  # of losses in fp32, over eps
        assert float(optimizer.info.c[0]) == pytest.approx(c, rel=1e-3, abs=rounding)
    optimizer.handle.merge()
    assert all(torch.allclose(p.double(), weights(plain)[name], atol=1e-4) for name, p in weights(model).items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_is_replayed_and_goes_on_from_its_state(tmp_path, options):
    base, tokens = Zoo(), torch.randint(0, 11, (4, 9))
    model, path = copy.deepcopy(base), tmp_path / "run"

    def losses(of):
        def loss(rows):
            logits = of(rows[:, :-1]).float()
            return nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

        return loss

    optimizer = make(model, **options)
    with Journal.create(path, optimizer):
        for step in range(8):
            optimizer.step(losses(model), tokens)
            if step == 4:
                state, there = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weights(model))
    after, again = weights(model), copy.deepcopy(base)
    assert replay(again, path).agrees and same(weights(again), after) and not same(after, weights(base))
    other = copy.deepcopy(base)
    other.load_state_dict(there, strict=False)
    optimizer = make(other, **options)
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step(losses(other), tokens)
    optimizer.flush()
    optimizer.handle.merge()
    assert same(weights(other), after)


def test_the_report_and_the_handle_know_it(own):
    model = Zoo()
    handle = patch(model, estimator="halves", rank=2)
    assert {p.treatment for p in handle.report().parameters} == {"low-rank 2", "dense", "left alone"}
    assert handle.config.factored and register_estimator(Halves) is own
    with pytest.raises(ValueError, match="LOZO needs a handle with estimator='lowrank', and this one has 'halves'"):
        LOZO(handle)


def faulty(**methods):
    return type("Faulty", (Halves,), {"name": "faulty", **methods})


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("right", lambda *_: torch.zeros(1, 2, 5) + 0.1, "fp16 does not have"),
        ("right", lambda *_: torch.zeros(2, 5), r"right\(\) of Faulty returns a tensor of shape \(1, 2, 5\), not \(2, 5\)"),
        ("left", lambda *_: None, r"left\(\) of Faulty returns a tensor of shape \(1, 3, 2\), not NoneType"),
    ],
)
def test_what_a_class_may_not_return(method, returned, message):
    model = nn.Linear(5, 3)
    before = weights(model)
    handle = Handle(model, PatchConfig(), faulty(**{method: returned})(PatchConfig()))
    with pytest.raises(ValueError, match=message):
        handle.perturb_(0, 1.0)
    assert same(weights(model), before)


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (nn.Linear, TypeError, "subclass of lozo_kernels.FactoredEstimator"),
        (type("NoName", (FactoredEstimator,), {"left": None, "right": None}), TypeError, "a word in small letters"),
        (type("Half", (FactoredEstimator,), {"name": "half", "left": Halves.left}), TypeError, r"Half lacks right\(\)"),
        (type("Other", (Halves,), {"name": "halves"}), ValueError, "'halves' already, .*Halves"),
        (type("Taken", (Halves,), {"name": "dense"}), ValueError, "'dense' already"),
    ],
)
def test_what_is_not_registered(estimator, error, message):
    with pytest.raises(error, match=message):
        register_estimator(estimator)


def test_captures_and_other_scalings_are_refused():
    model = Zoo()
    optimizer, loss = make(model), zoo_loss(model)
    with pytest.raises(NotImplementedError, match="Halves cannot be captured"):
        capture_step(optimizer, loss)
    with pytest.raises(ValueError, match="directions of 'halves' have one scale"):
        patch(Zoo(), estimator="halves", scaling="card")


@pytest.fixture
def forgotten():
    """A plug-in's estimator is known to no other test."""
    yield
    config.ESTIMATORS.remove("orthogonal")
    config.FACTORED.remove("orthogonal")
    del estimators.ESTIMATORS["orthogonal"], optim_methods.OPTIMIZERS["orthogonal"], sys.modules["own_estimator"]
    plugin._LOADED.clear()


@pytest.mark.usefixtures("forgotten")
def test_the_command_takes_the_method_of_a_plugin(tmp_path, capsys):
    pytest.importorskip("transformers")
    run = str(tmp_path / "run")
    asked = [
        "finetune",
        "--method",
        "orthogonal",
        "--steps",
        "3",
        "--eval-size",
        "4",
        "--batch-size",
        "4",
        "--output",
        run,
        "--quiet",
    ]
    assert main(asked) == 2 and "--method 'orthogonal' is not known" in capsys.readouterr().err
    assert "orthogonal" not in METHODS
    own = ["--plugin", str(Path(__file__).parents[1] / "examples" / "own_estimator.py")]
    assert main([*own, *asked, "--lr", "1e-3", "--rank", "3"]) == 0
    assert main([*own, "finetune", "--resume", run, "--steps", "5", "--quiet"]) == 0
    assert main([*own, "verify", "--journal", run, "--checkpoint", run]) == 0
    assert "5 steps replayed" in capsys.readouterr().out and METHODS["orthogonal"].label == "Orthogonal"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "registers no estimator"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        (
            "from python_tests.test_own_estimator import Halves, register_estimator\nregister_estimator(Halves)",
            "registers no estimator",
        ),
    ],
)
def test_plugins_that_are_none(tmp_path, capsys, text, message):
    path = tmp_path / "no_plugin.py"
    path.write_text(text, encoding="utf-8")
    assert main(["--plugin", str(path), "finetune"]) == 2 and message in capsys.readouterr().err
    assert main(["--plugin", "not.there", "doctor"]) == 2 and "ModuleNotFoundError" in capsys.readouterr().err
