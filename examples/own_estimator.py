"""A method of one's own, LOZO with an orthonormal V: it trains, finds its learning rate, keeps a journal, and replays.
Run: python examples/own_estimator.py [steps], or lozo-kernels --plugin examples/own_estimator.py finetune --method orthogonal"""

import copy
import sys
import tempfile

import torch

from lozo_kernels import Draw, FactoredEstimator, ops, register_estimator
from lozo_kernels.journal import Journal, replay


@register_estimator
class Orthogonal(FactoredEstimator):
    """Directions L V^T, L new at every draw, V for a window of steps. Both follow from the seed and the name of the weight."""

    name = "orthogonal"

    def _normal(self, spec, rows, draw, stream):
        batch, rank, where = spec.extent[0], self.config.rank, {"stream": stream, "device": spec.device, "backend": spec.backend}
        return ops.factor(self.config.seed, batch * rows, rank, spec.tensor_id, draw, **where).view(batch, rows, rank)

    def left(self, spec, draw):
        return self._normal(spec, spec.extent[1], draw, "U") / self.config.rank

    def right(self, spec, window):
        q, r = torch.linalg.qr(self._normal(spec, spec.extent[2], Draw(window), "V").double())
        return (q * torch.diagonal(r, dim1=1, dim2=2).sign()[:, None] * spec.extent[2] ** 0.5).mT.half().float()


if __name__ == "__main__":
    base, x = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)), torch.randn(64, 16)
    optimizer = Orthogonal(model := copy.deepcopy(base), lr="auto", rank=4, directions=4)
    with tempfile.TemporaryDirectory() as folder, Journal.create(f"{folder}/run.journal", optimizer) as journal:
        for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 300):
            loss = optimizer.step(lambda rows: (model(x[rows]) - x[rows, :4]).square().sum(1), torch.randint(64, (32,)))
        journal.finish()
        replay(base, f"{folder}/run.journal")
    print(f"loss {float(loss):.3f}; the replay has the same bits:", all(map(torch.equal, base.parameters(), model.parameters())))
