"""How many kernels a pass launches, and how the tables on the device follow the model."""

import pytest
import torch
from torch import nn

from lozo_kernels import LOZO
from lozo_kernels.kernels.backends import launches
from lozo_kernels.kernels.backends.launches import ANY_DTYPE, DeviceTable, Tile, device_table, merge_table
from lozo_kernels.kernels.calls import Draw
from lozo_kernels.kernels.table import TensorTable
from python_tests.models import Zoo

pytest.importorskip("triton")
host = pytest.importorskip("bench.host")


@pytest.fixture(scope="module")
def opt():
    """The parameters of OPT-1.3B, 388 of them, in memory that nothing touches."""
    pytest.importorskip("transformers")
    return host.empty_model("opt-1.3b", torch.bfloat16)


def count(handle, launcher, make):
    make(0)
    launcher.launches = 0
    make(1)
    return launcher.launches


def test_a_pass_over_opt_1_3b_is_two_launches(opt):
    """Matrices, and the 1-D tensors; an update with momentum has one more, for N."""
    with host.stubbed_handle(opt, rank=4) as (handle, launcher):
        assert len(handle.names) == 388
        for make in host.passes(handle).values():
            assert count(handle, launcher, make) == 2
        handle.enable_momentum()
        assert count(handle, launcher, lambda step: handle.update_(step, 0.5, 1e-6, beta=0.9, applied=1e-3)) == 3


def test_a_model_of_two_dtypes_is_three_launches(opt):
    for name, p in opt.named_parameters():
        if "fc1" in name:
            p.data = torch.empty(p.shape, dtype=torch.float32)
    with host.stubbed_handle(opt, rank=4) as (handle, launcher):
        assert count(handle, launcher, lambda step: handle.perturb_(step, 1e-3)) == 3
    opt.to(torch.bfloat16)


def test_mezo_is_one_launch_and_one_for_odd_tensors():
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 3))
    with host.stubbed_handle(model, estimator="dense") as (handle, launcher):
        assert count(handle, launcher, lambda step: handle.perturb_(step, 1e-3)) == 2


def test_a_small_model_of_every_kind_is_two_launches():
    """Tensors too small for a launch of their own share one, whatever their dtype and shape."""
    model = Zoo()
    model.up.half()
    with host.stubbed_handle(model, rank=2) as (handle, launcher):
        assert count(handle, launcher, lambda step: handle.perturb_(step, 1e-3)) == 2


def test_tables_are_built_once_and_again_when_storage_moves(monkeypatch):
    built = []
    make = DeviceTable.__init__
    monkeypatch.setattr(
        DeviceTable, "__init__", lambda self, table, **more: (built.append(len(table)), make(self, table, **more))[1]
    )
    model = nn.Linear(8, 8)
    with host.stubbed_handle(model) as (handle, _):
        for step in range(3):
            handle.perturb_(step, 1e-3)
        assert len(built) == 2  # matrices, vectors
        model.weight.data = model.weight.data.clone()
        handle.perturb_(3, 1e-3)
        assert len(built) == 4
        assert device_table(handle.groups[0].table).tensors[0, 0] == model.weight.data_ptr()


def test_what_lies_at_the_same_address_is_looked_at_once_a_step():
    """A view of another dtype or shape at the same address is seen at the next step."""
    model = nn.Linear(8, 8, bias=False)
    with host.stubbed_handle(model) as (handle, _):
        handle.perturb_(0, 1e-3)
        before = handle.groups
        model.weight.data = model.weight.data.t()
        with pytest.raises((TypeError, ValueError), match="columns must be contiguous"):
            handle.perturb_(1, 1e-3)
        model.weight.data = model.weight.data.t()
        handle.perturb_(1, 1e-3)
        assert handle.groups is before or len(handle.groups) == 1
        model.weight.data = model.weight.data[:5]
        with pytest.raises(ValueError, match=r"was \(8, 8\), now is \(5, 8\)"):
            handle.perturb_(2, 1e-3)


@pytest.mark.parametrize("low_rank", [True, False])
def test_tiles_cover_every_element_once(rng, monkeypatch, low_rank):
    """Over odd and aligned tensors, strided and stacked ones, and tiles of any size."""
    monkeypatch.setattr(launches, "_LEAST_BYTES", 0)
    for _ in range(20):
        xs = []
        for _ in range(6):
            shape = (rng.choice((1, 1, 3)), rng.choice((0, 1, 5, 40)), rng.choice((1, 8, 24, 33)))
            x = torch.zeros(shape[0], shape[1], shape[2] + rng.choice((0, 0, 8)), dtype=rng.choice((torch.float32, torch.bfloat16)))
            xs.append(x[:, :, : shape[2]])
        vs = [torch.zeros(x.shape[0], 4, x.shape[2], dtype=torch.float16) for x in xs] if low_rank else None
        table = TensorTable(xs, list(range(len(xs))), v=vs)
        tile = Tile(rng.choice((1, 16)) if low_rank else 1, rng.choice((8, 16, 64)))
        on_device = DeviceTable(table)
        for launch in on_device.launches("test", lambda code, tile=tile: tile):
            for t, matrix, row, col in launch.tiles.tolist():
                start, stop = col * tile.cols, (col + 1) * tile.cols
                x = xs[t]
                if not low_rank and on_device.tensors[t, 6] != x.shape[2]:  # contiguous: one row of all elements
                    x = x.view(1, 1, -1)
                x[matrix, row : row + tile.rows, start:stop] += 1
                assert launch.dtype in (ANY_DTYPE, (torch.float32, torch.bfloat16).index(x.dtype))
        assert all((x == 1).all() for x in xs)


def test_headers_hold_words_of_numbers_and_of_tensors(rng):
    on_device = DeviceTable(TensorTable([torch.zeros(1, 1, 8)], [0]))
    seed, step = rng.getrandbits(64), rng.getrandbits(28)
    numbers = on_device.headers.words(seed, [Draw(step, 3), Draw(step + 1)])
    tensor = torch.tensor(step)
    assert torch.equal(numbers, on_device.headers.words(seed, [Draw(tensor, 3), Draw(tensor + 1)]))
    assert numbers.tolist()[2:] == [3, 0, 0, step, step + 1, 0]
    assert [n & 0xFFFFFFFF for n in numbers.tolist()[:2]] == [seed & 0xFFFFFFFF, seed >> 32]


def test_layers_of_a_pass_share_a_header():
    tables = [DeviceTable(TensorTable([torch.zeros(1, 1, 8)], [i])) for i in range(2)]
    first, second = (t.headers.words(7, [Draw(3)]) for t in tables)
    assert first is second
    assert tables[0].headers.words(7, [Draw(4)]).tolist() != first.tolist()
    assert tables[0].headers.words(7, []).tolist() == [7] + [0] * 7


def test_tables_of_outputs_are_built_once():
    x = torch.zeros(1, 4, 16)
    table = TensorTable([x], [0])
    memory = torch.zeros(40, 1, 4, 16)
    outs = [TensorTable([y], [0]) for y in memory]
    made = [merge_table(table, out) for out in outs]
    assert all(merge_table(table, out) is before for out, before in zip(outs, made, strict=True))
    assert made[1].outputs[0, 0] == memory[1].data_ptr() and made[1].tensors[0, 0] == x.data_ptr()
    assert merge_table(table, table) is device_table(table)
    other = TensorTable([x.clone()], [0])
    for _ in range(2):  # several tables may be merged into one
        assert merge_table(other, outs[0]).tensors[0, 0] == other.x[0].data_ptr()
        assert merge_table(table, outs[0]) is made[0]
    for _ in range(20):
        merge_table(TensorTable([x], [0]), outs[0])
    assert len(outs[0].cache["gpu merges"]) <= 4


def test_both_ends_of_a_merge_decide_how_it_is_done():
    """Dense tensors are one row only if that of the output is too; access is wide only if both allow it."""
    table = TensorTable([torch.zeros(1, 4, 16)], [0])

    def launch(out):
        on_device = merge_table(table, TensorTable([out], [0]))
        (only,) = on_device.launches("test", lambda code: Tile(1, 64))
        return on_device.tensors[0, 5].item(), only.aligned

    assert launch(torch.zeros(1, 4, 16)) == (1, True)
    assert launch(torch.zeros(1, 4, 24)[:, :, :16]) == (4, True)
    assert launch(torch.zeros(1, 4, 17)[:, :, :16]) == (4, False)
    assert launch(torch.zeros(65)[1:].view(1, 4, 16)) == (1, False)


def test_under_inference_mode(backend):
    model = nn.Linear(4, 4)
    optimizer = LOZO(model, lr=1e-2, backend=backend.name)
    before = model.weight.detach().clone()
    with torch.inference_mode():
        optimizer.step(lambda: model(torch.ones(1, 4)).sum())
    assert not torch.equal(before, model.weight)


def aligned(x, **place):
    v = torch.zeros(x.shape[0], 4, x.shape[2], dtype=torch.float16)
    table = TensorTable([x], [0], v=[v], **{name: [value] for name, value in place.items()})
    (only,) = DeviceTable(table).launches("test", lambda code: Tile(16, 64))
    return only.aligned


def test_what_does_not_allow_128_bit_access_takes_the_safe_kernel(monkeypatch):
    """One property at a time: the address, the columns, the strides of rows and of matrices, the place in the noise."""
    monkeypatch.setattr(launches, "_LEAST_BYTES", 0)
    storage = torch.zeros(4096, dtype=torch.bfloat16)

    def view(shape=(2, 4, 16), strides=(64, 16, 1), offset=0):
        return storage.as_strided(shape, strides, offset)

    assert aligned(view())
    assert aligned(view(strides=(72, 16, 1), offset=8))
    assert not aligned(view(offset=4))
    assert not aligned(view(shape=(2, 4, 12)))
    assert not aligned(view(strides=(128, 20, 1)))
    assert not aligned(view(strides=(68, 16, 1)))
    assert not aligned(view(), col_offsets=4, global_cols=32)
    assert not aligned(view(), col_offsets=0, global_cols=20)
    assert aligned(view(shape=(1, 1, 16)), row_offsets=2, global_cols=20)
    assert not aligned(view(shape=(1, 1, 16)), row_offsets=7, global_cols=20)
    assert aligned(view(), col_offsets=8, global_cols=32, row_offsets=3)
