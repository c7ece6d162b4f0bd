"""csrc/cpu through its C ABI."""

import torch


class NativeBackend:
    """Placeholder while the kernels are being written."""

    name = "native"

    def unavailable(self, device: torch.device) -> str | None:
        return "not built"
