"""The CUDA kernels, run on the CPU by an emulator: the same sources, the same C ABI, the bits of the compiled CPU kernels."""

import collections
import ctypes
import importlib.util
import re
import shlex
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from lozo_kernels import Draw, Rounding, TensorTable
from lozo_kernels.bench.cases import OPS, as_bits, random_case
from lozo_kernels.kernels import noise, ops, skinny
from lozo_kernels.kernels.backends import cuda, launches
from lozo_kernels.kernels.backends.cuda import CudaBackend
from lozo_kernels.kernels.backends.launches import device_table
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.summed import scratch_factor
from lozo_kernels.kernels.table import DTYPES
from python_tests.table_helpers import assert_same, random_shapes

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
EMULATOR = ROOT / "python_tests" / "cuda_host"
RANKS = [1, 2, 3, 4, 5, 8, 11, 16, 24, 33, 64]


def build_emulated(folder):
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = "-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror"
    paths = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    defines = ["-DLOZO_EMULATE", '-DLOZO_CUDA_ARCHITECTURES="emulated"']
    objects = []
    running = []
    for source in (*SOURCES, EMULATOR / "emulator.cpp"):
        objects.append(folder / f"{source.stem}.o")
        command = [compiler, *shlex.split(flags), *paths, *defines, "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        running.append(subprocess.Popen(command))
    assert all(process.wait() == 0 for process in running)
    library = folder / "liblozo_cuda_host.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    return library


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return build_emulated(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def emulated(library, monkeypatch, rng):
    """The backend, with fast kernels for small tensors too, and threads in one order or the other."""
    monkeypatch.setattr(launches, "_LEAST_BYTES", 0)
    controls = ctypes.CDLL(str(library))
    controls.emulator_reverse(rng.choice((0, 1)))
    yield CudaBackend(library, device_type="cpu")
    controls.emulator_allow_all()


@pytest.fixture
def guard(library):
    """A function that confines all further access to the tensors of a case, and the scratch memory of its table."""
    controls = ctypes.CDLL(str(library))

    def allow(case):
        scratch = [scratch_factor(case.table).memory] if case.table.v else []
        for t in (*case.table.x, *(case.table.v or ()), *(case.table.n or ()), *(case.out.x if case.out else ()), *scratch):
            extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
            controls.emulator_allow(ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(extent * t.element_size()), 1)

    yield allow
    controls.emulator_allow_all()


def both_kinds(rng, op, rank=0, count=4, **settings):
    """An awkward case, and one that the fast kernels take: multiples of eight everywhere, in poisoned storage all the same."""
    shapes = [(rng.choice((1, 1, 2)), rng.choice((1, 5, 16, 37, 70)), 8 * rng.choice((1, 3, 4, 9, 17, 33))) for _ in range(count)]
    shapes[0] = (1, rng.choice((1, 9)), 2048 + 8 * rng.choice((0, 5))) if rng.random() < 0.6 else shapes[0]
    aligned = random_case(rng, OPS[op], shapes, rank, step=8, **settings)
    tables = device_table(aligned.table, OPS[op].factors)
    assert OPS[op].factors or all(launch.aligned for launch in tables.launches("test", lambda dtype: launches.Tile(16, 16)))
    return [random_case(rng, OPS[op], random_shapes(rng), rank, **settings), aligned]


def peer():
    """The compiled CPU kernels, or plain PyTorch where they are missing."""
    try:
        return choose_backend("cpu", "native").backend
    except RuntimeError:
        return choose_backend("cpu", "eager").backend


def check(emulated, guard, case):
    """The bits of the compiled CPU kernels, with access confined to the tensors."""
    expected = case.on()
    expected.run(peer())
    guard(case)
    case.run(emulated)
    assert_same(case, expected)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_update(rng, emulated, guard, rank, draws):
    for case in both_kinds(rng, "lowrank_update_", rank, call={"draws": draws}):
        check(emulated, guard, case)


@pytest.mark.parametrize("law", noise.LAWS)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("op", ["dense_update_", "dense_momentum_"])
def test_dense(rng, emulated, guard, op, draws, stochastic, law):
    for case in both_kinds(rng, op, call={"draws": draws, "stochastic": stochastic, "law": law}):
        check(emulated, guard, case)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_momentum(rng, emulated, guard, rank, draws):
    for case in both_kinds(rng, "lowrank_momentum_", rank, call={"draws": draws}):
        check(emulated, guard, case)


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("op", ["factor_update_", "factor_momentum_"])
def test_factors(rng, emulated, guard, op, rank, draws):
    for case in both_kinds(rng, op, rank, call={"draws": draws}):
        check(emulated, guard, case)


@pytest.mark.parametrize("draws", [0, 1])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_lowrank_merge(rng, emulated, guard, rank, apart, draws):
    """In place, or into memory that is laid out in another way."""
    for case in both_kinds(rng, "lowrank_merge_", rank, call={"draws": draws}, apart=apart):
        check(emulated, guard, case)


def test_ops_without_a_kernel(rng, emulated):
    case = random_case(rng, OPS["dense_merge_"], [(1, 5, 24), (2, 3, 7)], call={"draws": 1, "stochastic": False})
    expected = case.on()
    expected.run(choose_backend("cpu", "eager").backend)
    case.run(emulated)
    assert_same(case, expected)


def test_products_of_activations(emulated):
    v, b = noise.to_grid(torch.randn(3, 9)).half(), torch.randn(7, 3)
    where = {"seed": 5, "tensor_id": 6, "draws": torch.tensor([[1, 0]]), "scales": torch.tensor([0.5])}
    y, x, rows = torch.zeros(4, 7), torch.randn(4, 9), torch.tensor([0, 6, 2, 2])
    skinny.lowrank_linear_(y, x, v, b, **where, backend=emulated)
    f = b + 0.5 * noise.factor(5, 7, 3, 6, 1)
    assert torch.allclose(y, x @ v.float().T @ f.T, atol=1e-4)
    y = torch.zeros(4, 9)
    skinny.lowrank_embedding_(y, rows, v, b, **where, backend=emulated)
    assert torch.allclose(y, f[rows] @ v.float(), atol=1e-4)
    y, u = torch.zeros(4, 7), torch.randn(2, 2, 7)
    directions, scales = torch.tensor([0, 1, 1, 0]), torch.tensor([0.5, 1.0, -2.0, 0.0])
    skinny.lowrank_points_(y, x, v.float(), b.T.contiguous(), u, directions, scales, backend=emulated)
    own = torch.stack([(x[t] @ v[:2].float().T) @ u[directions[t]] * scales[t] for t in range(4)])
    assert torch.allclose(y, x @ v.float().T @ b.T + own, atol=1e-4)


@pytest.mark.parametrize("reproject", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_resample(rng, emulated, guard, rank, reproject):
    for case in both_kinds(rng, "resample_", rank, n=reproject):
        check(emulated, guard, case)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("stream", ["U", "V", "S"])
def test_factor(rng, emulated, rank, stream):
    where = (rng.getrandbits(64), 131, rank, rng.getrandbits(32))
    draw, offset = Draw(rng.getrandbits(28), 3), rng.choice((0, 1 << 31, (1 << 32) - 131))
    made = ops.factor(*where, draw, stream=stream, row_offset=offset, backend=emulated)
    assert torch.equal(made, noise.factor(*where, draw.step, stream=stream, row_offset=offset, direction=draw.direction))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("first", [(1 << 22) - 2, (1 << 26) - 2, (1 << 27) + 5], ids=["2^35", "2^39", "beyond 2^40"])
@pytest.mark.parametrize("law", noise.LAWS)
def test_flat_positions_beyond_32_bits(rng, emulated, law, first, dtype, momentum):
    """The carry of the counters into their second word, inside a tensor: at 2^34 elements, of signs at 2^39; and beyond both."""
    x = torch.randn(1, 3, 1 << 12).to(dtype)
    cases = []
    for backend in (emulated, peer()):
        n = [torch.ones(1, 3, 1 << 12)] if momentum else None
        table = TensorTable([x.clone()], [9], n=n, row_offsets=[first], col_offsets=[2056], global_cols=[1 << 13])
        call = {"seed": 5, "draws": [Draw(1), Draw(2)], "scales": 0.5, "rounding": Rounding(4), "law": law}
        if momentum:
            ops.dense_momentum_(table, **call, coefficients=0.1, alpha=0.2, beta=0.9, backend=backend)
        else:
            ops.dense_update_(table, **call, backend=backend)
        cases.append(table)
    assert torch.equal(as_bits(cases[0].x[0]), as_bits(cases[1].x[0]))
    assert not momentum or torch.equal(cases[0].n[0], cases[1].n[0])


@pytest.mark.parametrize("op", ["lowrank_update_", "lowrank_momentum_", "dense_update_", "dense_momentum_"])
def test_values_that_are_not_finite(emulated, op):
    """Rounding of every class of number into every dtype, on the fast and the safe kernels."""
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38, -65520.0, 65519.0, 6e-8, 2.0**-14, 1.0]
    low_rank, momentum = "lowrank" in op, "momentum" in op
    for cols in (16, 13):
        tables = []
        for backend in (emulated, peer()):
            values = torch.tensor(special * 8)[: 4 * cols].view(1, 4, cols)
            xs = [values.to(dtype) for dtype in DTYPES]
            v = [torch.ones(1, 4, cols, dtype=torch.float16) for _ in xs] if low_rank else None
            n = [torch.ones(1, 4, 4 if low_rank else cols) for _ in xs] if momentum else None
            table = TensorTable(xs, [1, 2, 3], v=v, n=n)
            call = {"seed": 1, "draws": [Draw(1)], "scales": 0.0, "rounding": Rounding(3)}
            if momentum:
                call |= {"coefficients": 0.0, "alpha": 0.0, "beta": 1.0}
            getattr(ops, op)(table, **call, backend=backend)
            tables.append(table)
        for a, b in zip(tables[0].x, tables[1].x, strict=True):
            assert torch.equal(as_bits(a), as_bits(b))


def test_empty_table(emulated):
    ops.dense_update_(TensorTable([], []), seed=0, draws=[Draw(0)], scales=1.0, backend=emulated)


def test_versions_count_changes(emulated):
    x = torch.zeros(1, 2, 8)
    before = x._version
    ops.dense_update_(TensorTable([x], [0]), seed=0, draws=[Draw(0)], scales=1.0, backend=emulated)
    assert x._version > before


def test_reasons(tmp_path):
    assert CudaBackend().unavailable(torch.device("cpu")) == "it serves cuda only"
    missing = CudaBackend(tmp_path / "none.so", device_type="cpu")
    assert missing.unavailable(torch.device("cpu")) == "not built (reinstall lozo_kernels where nvcc is)"
    if not torch.cuda.is_available():
        assert CudaBackend().unavailable(torch.device("cuda")) is not None


def test_looking_for_a_device_leaves_the_current_one(monkeypatch):
    """The library makes the device that it is asked about current."""
    current, asked = [0], []

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    def probe(index):
        current[0] = index
        asked.append(index)
        return 0

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(cuda, "_load", lambda _: types.SimpleNamespace(lozo_cuda_probe=probe))
    assert CudaBackend().unavailable(torch.device("cuda", 1)) is None
    assert asked == [1] and current == [0]


def test_emulator_reports_accesses_outside(emulated, guard):
    case = TensorTable([torch.zeros(1, 4, 16)], [0])
    other = TensorTable([torch.zeros(1, 4, 16)], [0])
    guard(types.SimpleNamespace(table=other, out=None))
    with pytest.raises(RuntimeError, match="outside the tensors"):
        ops.dense_update_(case, seed=0, draws=[Draw(0)], scales=1.0, backend=emulated)


NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_cuobjdump():
    """Of the toolkit, or of Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump") or (beside and shutil.which(str(beside)))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_machine_code(source, tmp_path):
    """Nothing spills; only products with N have fused multiply-adds; fast kernels move 128 bits at a time."""
    flags = "-std=c++17 -O3 -fmad=false -Xptxas -v -gencode arch=compute_90,code=sm_90 -c"
    defines = ['-DLOZO_CUDA_ARCHITECTURES="90"', f"-I{ROOT / 'csrc' / 'include'}"]
    target = str(tmp_path / "object.o")
    done = subprocess.run([NVCC, *flags.split(), *defines, str(source), "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = [line.strip() for line in done.stderr.splitlines() if "bytes stack frame" in line]
    assert frames and all(line.startswith("0 bytes stack frame, 0 bytes spill stores") for line in frames), done.stderr
    if find_cuobjdump() is None:
        pytest.skip("compiled without spills; there is no cuobjdump to read the machine code")
    sass = subprocess.run([find_cuobjdump(), "-sass", target], capture_output=True, text=True, check=True).stdout
    for kernel in sass.split("Function : ")[1:]:
        name = kernel.split()[0]
        codes = [re.sub(r"^@!?U?P\w+ +", "", code) for code in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", kernel)]
        count = collections.Counter(code.split()[0] for code in codes if code)
        fused = [code for code in count if code.startswith("FFMA")]
        # The library's division in fp64 starts from an fp32 estimate.
        with_products = ("resample_momentum", "lowrank_merge_aligned", "lowrank_merge_any")
        assert not fused or any(word in name for word in ("resample_factor", *with_products)), name
        assert not any(code.startswith(("LD.", "ST.", "LDL", "STL")) for code in count), name
        if "aligned" in name:
            assert count["LDG.E.128"] and count["STG.E.128"], name
            assert not any(code in count for code in ("STG.E", "STG.E.64", "STG.E.U16")), name
