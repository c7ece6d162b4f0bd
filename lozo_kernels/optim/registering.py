"""Methods of others: an estimator that is registered trains, probes, journals and replays as those of this package do."""

from __future__ import annotations

import re

from ..model.config import ESTIMATORS as NAMES
from ..model.config import FACTORED
from ..model.estimators import ESTIMATORS, FactoredEstimator
from .methods import OPTIMIZERS
from .optimizer import ZerothOrderOptimizer


def register_estimator(estimator: type[FactoredEstimator]) -> type[ZerothOrderOptimizer]:
    """Registers an estimator under its name, and returns an optimiser class for it, which takes what :class:`lozo_kernels.SubZero`
    takes. Whatever knows methods by name knows it from then on: ``patch(model, estimator=name)``, journals and their replay. A
    program that replays a journal registers the estimator first.

    Args:
        estimator: a subclass of :class:`~lozo_kernels.FactoredEstimator` with a name of its own.

    Raises:
        TypeError: it is no such class, or lacks a method or a name.
        ValueError: another estimator has this name. To register the same class again changes nothing.

    Example::

        class Orthogonal(FactoredEstimator):
            name = "orthogonal"

            def left(self, spec, draw):
                batch, rows, _ = spec.extent
                rank = self.config.rank
                u = ops.factor(self.config.seed, batch * rows, rank, spec.tensor_id, draw, device=spec.device, backend=spec.backend)
                return u.view(batch, rows, rank) / rank

            def right(self, spec, window): ...

        OrthogonalLOZO = register_estimator(Orthogonal)
        optimizer = OrthogonalLOZO(model, lr=1e-6, rank=4, interval=50)
    """
    if not (isinstance(estimator, type) and issubclass(estimator, FactoredEstimator)):
        raise TypeError(f"an estimator is a subclass of lozo_kernels.FactoredEstimator, not {estimator!r:.200}")
    lacking = sorted(getattr(estimator, "__abstractmethods__", ()))
    if lacking:
        raise TypeError(f"{estimator.__name__} lacks {', '.join(lacking)}()")
    name = getattr(estimator, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise TypeError(f"{estimator.__name__}.name is a word in small letters, not {name!r:.200}")
    known = ESTIMATORS.get(name)
    if known is not None and known is not estimator:
        raise ValueError(
            f"there is an estimator named {name!r} already, {known.__module__}.{known.__qualname__}: take another name"
        )
    if known is None:
        NAMES.append(name)
        FACTORED.add(name)
        ESTIMATORS[name] = estimator
        about = {"estimator": name, "__doc__": estimator.__doc__, "__module__": estimator.__module__}
        OPTIMIZERS[name] = type(estimator.__name__, (ZerothOrderOptimizer,), about)
    return OPTIMIZERS[name]
