"""What is planned: a method, a batch and a device, with their checks."""

from __future__ import annotations

import dataclasses

from ...errors import InputError
from ...kernels.noise import MAX_RANK
from ...model.config import PLACEMENTS
from ..command_line import check_options, option
from ..methods import ZEROTH_ORDER, take_defaults
from ..settings import DTYPES, spell_dtype

PLANNED = (*(name for name, method in ZEROTH_ORDER.table.items() if not method.splits(method.evaluation)), "ft")
"""The methods that can be planned; "ft" is backpropagation with AdamW."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What :func:`lozo_kernels.hf.plan` takes beside the model; ``lozo-kernels plan --help`` says what each field means.

    Raises:
        InputError: a value is unknown or out of range.
    """

    method: str = option("lozo", choices=PLANNED)
    rank: int = option(None, "columns of U and V (default: 2, of zo-muon 64)", low=1, high=MAX_RANK)
    interval: int = option(None, "steps between two draws of V (default: 50, of zo-muon 100)", low=1)
    dtype: str = option("bfloat16", choices=DTYPES)
    batch_size: int = option(16, "examples of one forward pass", low=1)
    sequence_length: int = option(256, "tokens of each example", low=1)
    placement: str = option("auto", "probe, inplace or auto", choices=PLACEMENTS)
    trust_remote_code: bool = option(False, "run Python code that comes with the model: only if you have read it")
    device_bandwidth: float | None = option(None, "GB/s of the device that is meant (default: measured here)", low=0.0, above=0)
    device_tflops: float | None = option(
        None,
        "its matrix products, 1e12 operations per second, in --dtype (default: forward passes wait for memory alone)",
        low=0.0,
        above=0,
    )

    def __post_init__(self) -> None:
        take_defaults(self)
        spell_dtype(self)
        check_options(self)
        if self.device_tflops is not None and self.device_bandwidth is None:
            raise InputError("--device-tflops goes with --device-bandwidth")
