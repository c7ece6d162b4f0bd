"""find_eps against the error of c that a gradient in fp64 shows, and what it refuses."""

import copy
import math

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO, find_eps, handle_of, patch
from lozo_kernels.cli.command import main
from lozo_kernels.hf.settings import Settings
from lozo_kernels.journal import read_journal
from lozo_kernels.optim.eps_finder import SCALES, best_scale
from python_tests.models import Zoo, same, weights, zoo_loss


def test_the_error_of_a_model_of_both_errors_is_smallest_there(rng):
    """c(eps) = c + a z / eps + b eps^2: the error is smallest at (a^2 / 2 b^2)^(1/6), for any a and b."""
    for _ in range(20):
        c, noise, cubic = torch.randn(16, dtype=torch.float64), torch.randn(len(SCALES), 16, dtype=torch.float64), torch.randn(16)
        best = 10.0 ** rng.uniform(-4, -2)
        b = 10.0 ** rng.uniform(-1, 1) / best**2 * 1e-3
        a = b * best**3 * math.sqrt(2.0)
        scales = torch.tensor(SCALES, dtype=torch.float64).unsqueeze(1)
        found = best_scale(c + a * noise / scales + b * cubic * scales**2)
        assert best / 2.9 < found < best * 2.9, (best, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["inplace", "probe"])
def test_c_has_a_smaller_error_than_elsewhere(rng, dtype, placement):
    """Beside an eps 30 times smaller and one as much larger, of steps as they are taken; the weights are as they were."""
    torch.manual_seed(rng.getrandbits(32))
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 10)).to(dtype)
    x, y = torch.randn(50, 40).to(dtype), torch.randint(0, 10, (50,))
    before, options = weights(model), {"rank": 3, "placement": placement, "seed": rng.getrandbits(64)}
    eps = find_eps(model, lambda rows: nn.functional.cross_entropy(model(rows).float(), y, reduction="none"), x, **options)
    assert same(weights(model), before) and handle_of(model) is None and SCALES[0] < eps < 2 * SCALES[-1]
    wide = copy.deepcopy(model).double()
    nn.functional.cross_entropy(wide(x.double()), y).backward()
    handle = patch(copy.deepcopy(model), **options)
    gradients = {name: p.grad for name, p in wide.named_parameters()}
    slopes = [sum((g * handle.materialize(n, 0, direction=d).double()).sum() for n, g in gradients.items()) for d in range(8)]
    errors = []
    for scale in (eps / 30, eps, eps * 30):
        own = copy.deepcopy(model)
        optimizer = LOZO(own, eps=scale, lr=0.0, directions=8, **options)
        optimizer.step(lambda own=own: nn.functional.cross_entropy(own(x).float(), y))
        errors.append(float((optimizer.info.c - torch.stack(slopes)).square().mean().sqrt()))
    assert errors[1] < min(errors[0], errors[2]), (eps, errors)


def test_what_has_no_eps_is_refused():
    model = Zoo()
    before = weights(model)
    for closure in (lambda: 1.0, lambda: float("nan"), lambda: float(torch.rand(()))):
        with pytest.raises(ValueError, match=r"no eps from 2e-05 to 0[.]03 gives a slope"):
            find_eps(model, closure)
        assert same(weights(model), before) and handle_of(model) is None
    with pytest.raises(TypeError, match=r"find_eps\(\) got an unexpected keyword argument 'momentum'"):
        find_eps(model, zoo_loss(model), momentum=0.9)
    assert find_eps(model, zoo_loss(model), estimator="muon", rank=4) in {math.sqrt(2) * scale for scale in SCALES}


def test_finetune_has_the_eps_that_it_measured(tmp_path, capsys):
    pytest.importorskip("transformers")
    run = tmp_path / "run"
    asked = ["finetune", "--find-eps", "--steps", "2", "--eval-size", "4", "--batch-size", "4", "--output", str(run), "--quiet"]
    assert main(asked) == 0
    settings = read_journal(run / "run.journal").header
    assert settings.settings["eps"] != 1e-3 and settings.about["settings"]["eps"] == settings.settings["eps"]
    assert main(["finetune", "--resume", str(run), "--steps", "4", "--quiet"]) == 0
    assert main(["verify", "--journal", str(run), "--checkpoint", str(run)]) == 0
    capsys.readouterr()
    assert main([*asked, "--eps", "0.1"]) == 2 and "--eps or --find-eps" in capsys.readouterr().err
    assert main([*asked, "--method", "ft"]) == 2 and "--find-eps means nothing" in capsys.readouterr().err
    assert not Settings().find_eps
