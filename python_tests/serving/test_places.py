"""Every parameter of the Hugging Face model has its place in the engine: losses at perturbed points are the same."""

import pytest
import torch

import lozo_kernels
from lozo_kernels.vllm import LOZO, nll

from .engines import CONFIGS, EPS, OPTIONS, engine, loss_of, losses_at, perturbed, reference, texts


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_a_perturbed_hugging_face_model(models, name):
    """At points that share a batch; with mixtral the experts have no place, and are named."""
    path, some = models(name), texts(1)
    points = [(0, 0.0), (0, EPS), (0, -EPS), (1, EPS), (1, -EPS)]
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS, directions=2)
        handle = optimizer.handle
        objective = nll(some)
        handle.check(objective)
        found = losses_at(handle, objective, points)
        model = reference(path)
        every = {n for n, _ in model.named_parameters()}
        left = {n for n in every if ".experts." in n}
        assert set(handle.not_placed) == left
        assert handle.names == lozo_kernels.patch(model, **OPTIONS, exclude=sorted(left) or None).names
        assert {r.name for r in optimizer.report().parameters if r.treatment != "left alone"} == every - left
        wanted = perturbed(path, some, points, exclude=sorted(left) or None)
        for point in points:
            assert abs(found[point] - wanted[point]) < 1e-6, (point, found[point], wanted[point])
        moved = [abs(found[p] - found[0, 0.0]) for p in points[1:]]
        assert min(moved) > 1e-4, moved  # all of them say something
        optimizer.remove()


def test_each_parameter_alone_moves_the_loss_as_in_hugging_face(models, monkeypatch):
    """So that no two places hide each other's fault. GPT-2 has matrices that are stored transposed, and a table of positions."""
    path, some = models("gpt2"), texts(2)
    model = reference(path)
    rest = loss_of(model, some)
    own = lozo_kernels.patch(model, **OPTIONS)
    with engine(path) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        handle, objective = optimizer.handle, nll(some)
        handle.check(objective)
        factors = llm.llm_engine.model_executor.driver_worker.worker.lozo.factors
        draw, alone = factors._draw, [""]

        def draw_one():
            draw()
            for name, learned in factors.learned.items():
                if learned.u is not None and name != alone[0]:
                    learned.u.zero_()

        monkeypatch.setattr(factors, "_draw", draw_one)
        for p in own.trained:
            alone[0], scale = p.name, 0.05
            factors.directions = []  # so that they are drawn anew
            found = losses_at(handle, objective, [(0, scale)])[0, scale]
            with torch.no_grad():
                before = p.tensor.detach().clone()
                p.tensor.add_(scale * own.materialize(p.name, 0))
                wanted = loss_of(model, some)
                p.tensor.copy_(before)
            assert abs(found - wanted) < 1e-6 + 1e-4 * abs(wanted - rest), (p.name, found - rest, wanted - rest)


def test_patterns_choose_what_is_trained(models):
    with engine(models("llama"), ours={"include": ["*self_attn*"], "exclude": ["*o_proj*"]}) as llm:
        optimizer = LOZO(llm, lr=1e-4, eps=EPS)
        assert all("self_attn" in name and "o_proj" not in name for name in optimizer.handle.names)
        assert len(optimizer.handle.names) == 6
        rows = {row.name: row for row in optimizer.report().parameters}
        assert rows["model.layers.0.self_attn.o_proj.weight"].treatment == "left alone"
        assert "pattern" in rows["model.layers.0.self_attn.o_proj.weight"].note
        assert bool(torch.isfinite(optimizer.step(nll(texts(3)))))
