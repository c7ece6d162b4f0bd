"""What served trainers allocate: nothing as large as a weight, but for the dense noise of a published stream."""

import pytest

from lozo_kernels.adapters import DirectionBackend, accelerate_trainer
from lozo_kernels.kernels.registry import choose_backend
from python_tests.allocations import LargestNew
from python_tests.miniatures import LozoLarge, LozoMedium, MezoLarge, MezoMedium, SubZeroMini, TinyLM
from python_tests.miniatures_with_steps import Zo2Mini, ZoLlmMini
from python_tests.test_adapters import LOZO, MEDIUM, SUBZERO, run

WIDTH, VOCABULARY = 150, 400
LARGEST = WIDTH * VOCABULARY
SKINNY = 8 * VOCABULARY  # a factor of rank 8

pytestmark = pytest.mark.skipif(choose_backend("cpu").backend.name != "native", reason="the eager backend makes temporaries")


def served(kind, compat, **options):
    class Unseeing(kind):
        def see(self, model):  # would copy the weights
            pass

    trainer = Unseeing(TinyLM(WIDTH, VOCABULARY), iter([0.1, 0.2, 0.0, 0.3] * 9), **options)
    accelerate_trainer(trainer, compat=compat)
    return trainer


@pytest.mark.parametrize(
    ("kind", "options", "compat"),
    (
        (MezoLarge, {"weight_decay": 0.1}, None),
        (MezoMedium, {"weight_decay": 0.1}, None),
        (LozoLarge, LOZO, None),
        (LozoMedium, MEDIUM, None),
        (SubZeroMini, SUBZERO, None),
        (ZoLlmMini, {}, None),
        (Zo2Mini, {"weight_decay": 0.1}, None),
        (LozoLarge, LOZO | {"weight_decay": 0.1}, "published"),
        (LozoMedium, MEDIUM | {"weight_decay": 0.1}, "published"),
        (SubZeroMini, SUBZERO, "published"),
    ),
)
def test_nothing_as_large_as_a_weight(kind, options, compat):
    trainer = served(kind, compat, **options)
    with LargestNew() as largest:
        run(trainer, 4, 1)
    assert 0 < largest.numel <= SKINNY, f"{largest.what} made {largest.numel} elements"


@pytest.mark.parametrize("kind", (MezoLarge, Zo2Mini))
def test_published_dense_noise_is_as_large_as_one_weight(kind):
    trainer = served(kind, "published", weight_decay=0.1)
    with LargestNew() as largest:
        run(trainer, 2, 1)
    assert largest.numel == LARGEST


def test_momentum_of_dense_noise_is_as_large_as_the_weights_once():
    trainer = served(ZoLlmMini, None, momentum=0.9)
    run(trainer, 1, 1)
    with LargestNew() as largest:
        run(trainer, 2, 1)
    assert largest.numel <= SKINNY


@pytest.mark.parametrize("estimator", ("dense", "lowrank"))
def test_directions(estimator):
    backend = DirectionBackend(TinyLM(WIDTH, VOCABULARY), estimator=estimator)
    with LargestNew() as largest:
        backend.perturb(1, 0.1)
        backend.update([1, 2], [0.5, -1.0], 0.1, 0.2)
        backend.revert([1, 2], [0.5, -1.0], 0.1, 0.2)
    assert largest.numel <= SKINNY
