"""What tensors a stretch of code makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestNew(TorchDispatchMode):
    """The largest tensor that operators of torch make: ``numel``, ``bytes``, and the operator ``what``."""

    def __init__(self):
        super().__init__()
        self.numel, self.bytes, self.what = 0, 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old and t.nbytes > self.bytes:
                self.numel, self.bytes, self.what = t.numel(), t.nbytes, function
        return out
