"""The noise contract: committed vectors, the numpy specification, statistics, ids."""

import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lozo_kernels import Draw, TensorTable
from lozo_kernels.kernels import noise, ops
from lozo_kernels.kernels.backends import native
from lozo_kernels.kernels.backends.eager import EagerBackend
from python_tests import noise_file, noise_spec

NATIVE = native.NativeBackend()

seeds = st.integers(0, 2**64 - 1)
ids = st.integers(0, 2**32 - 1)
draws = st.integers(0, 2**28 - 1)
directions = st.integers(0, 2**24 - 1)


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize("vector", noise_file.VECTORS, ids=lambda v: v["function"] + "-" + str(v["arguments"].get("stream", "")))
def test_committed_vectors(vector):
    arguments = dict(vector["arguments"])
    got = getattr(noise, vector["function"])(**arguments).numpy().reshape(-1)
    expected = np.array(vector["values"], np.uint32)
    np.testing.assert_array_equal(got.view(np.uint32), expected)
    spec = getattr(noise_spec, vector["function"])(**arguments).reshape(-1)
    np.testing.assert_array_equal(spec.view(np.uint32), expected)


def test_text_form_of_the_vectors():
    assert noise_file.DOCUMENT["noise_version"] == noise.NOISE_VERSION
    assert noise_file.TEXT.read_text(encoding="utf-8") == "\n".join(noise_file.lines()) + "\n"
    streams = {line.split()[0] for line in noise_file.lines() if not line.startswith("#")}
    assert streams == {name.replace(" ", "_") for name in noise.STREAMS}


def test_reader_in_c(tmp_path):
    """It derives every value in plain C, and notices a wrong one."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source, reader = Path(__file__).parents[1] / "examples" / "noise_reader.c", tmp_path / "noise_reader"
    flags = ["-std=c99", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, source, "-o", reader], check=True)
    text = noise_file.TEXT.read_text(encoding="utf-8")
    done = subprocess.run([reader], input=text, capture_output=True, text=True)
    count = sum(len(vector["values"]) for vector in noise_file.VECTORS)
    assert (done.returncode, done.stdout) == (0, f"{count} values, 0 differ\n")
    done = subprocess.run([reader], input=text.replace("3efe0000", "3efe0001", 1), capture_output=True, text=True)
    assert done.returncode == 1 and f"{count} values, 1 differ" in done.stdout
    assert subprocess.run([reader], input="U 1 2\n", capture_output=True, text=True).returncode == 2


def test_philox_known_answer():
    # From the Random123 distribution (kat_vectors): counter and key of the digits of pi.
    words = noise.philox(0x299F31D0A4093822, torch.tensor([0x243F6A88]), 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [hex(w) for w in words[0].tolist()] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@settings(max_examples=60, deadline=None)
@given(seeds, ids, draws, directions, st.integers(1, 64), st.integers(0, 90), st.integers(0, 2**32 - 100), st.sampled_from("UVS"))
def test_factor_equals_specification(seed, tid, draw, direction, rank, rows, offset, stream):
    got = noise.factor(seed, rows, rank, tid, draw, stream=stream, row_offset=offset, direction=direction)
    np.testing.assert_array_equal(bits(got), bits(noise_spec.factor(seed, rows, rank, tid, draw, stream, offset, direction)))


@settings(max_examples=60, deadline=None)
@given(seeds, ids, draws, directions, st.integers(0, 300), st.integers(0, 2**42 - 300))
def test_flat_streams_equal_specification(seed, tid, draw, direction, numel, offset):
    z = noise.dense(seed, numel, tid, draw, offset=offset, direction=direction)
    np.testing.assert_array_equal(bits(z), bits(noise_spec.dense(seed, numel, tid, draw, offset, direction)))
    s = noise.dense(seed, numel, tid, draw, offset=offset, direction=direction, law="rademacher")
    np.testing.assert_array_equal(bits(s), bits(noise_spec.dense(seed, numel, tid, draw, offset, direction, "rademacher")))
    for stream, parts, first in (("row signs", 3, offset % 2**31), ("column signs", 1, offset % 2**31)):
        some = min(direction, 2**24 - parts)
        p = noise.part_signs(seed, parts, numel, tid, draw, stream=stream, offset=first, direction=some)
        np.testing.assert_array_equal(bits(p), bits(noise_spec.part_signs(seed, parts, numel, tid, draw, stream, first, some)))
    r = noise.rounding_bits(seed, numel, tid, draw, offset=offset, direction=direction)
    np.testing.assert_array_equal(r.numpy(), noise_spec.rounding_bits(seed, numel, tid, draw, offset, direction))


def implementations():
    """Every backend that serves the CPU, the native one once for each instruction set."""
    yield "eager", None
    if NATIVE.unavailable(torch.device("cpu")) is None:
        yield from (("native", isa) for isa in native.supported_isas())


@pytest.mark.parametrize(("name", "isa"), list(implementations()))
@settings(max_examples=25, deadline=None)
@given(seeds, ids, draws, directions, st.integers(1, 64), st.integers(1, 300), st.integers(0, 2**31))
def test_backends_regenerate_the_specification(name, isa, seed, tid, draw, direction, rank, rows, offset):
    """What the ops add to zeros is U, V and Z themselves, on every backend and instruction set; and factors are."""
    backend = NATIVE if name == "native" else EagerBackend()
    if isa:
        native.set_isa(isa)
    where = Draw(draw, direction)
    identity = torch.eye(rank, dtype=torch.float16)[None].contiguous()
    u = TensorTable([torch.zeros(1, rows, rank)], [tid], v=[identity], row_offsets=[offset])
    ops.lowrank_update_(u, seed=seed, draws=[where], scales=1.0, backend=backend)
    np.testing.assert_array_equal(bits(u.x[0][0]), bits(noise_spec.factor(seed, rows, rank, tid, draw, "U", offset, direction)))

    v = TensorTable([torch.zeros(1, 3, rows)], [tid], v=[torch.empty(1, rank, rows, dtype=torch.float16)], col_offsets=[offset])
    ops.resample_(v, seed=seed, window=draw, backend=backend)
    expected = noise_spec.factor(seed, rows, rank, tid, draw, "V", offset)
    np.testing.assert_array_equal(bits(v.v[0][0].T.float()), bits(expected))

    for law in noise.LAWS:
        z = TensorTable([torch.zeros(1, 1, rows)], [tid], col_offsets=[offset], global_cols=[offset + rows])
        ops.dense_update_(z, seed=seed, draws=[where], scales=1.0, law=law, backend=backend)
        np.testing.assert_array_equal(bits(z.x[0].view(-1)), bits(noise_spec.dense(seed, rows, tid, draw, offset, direction, law)))

    for stream in "UVS":
        f = ops.factor(seed, rows, rank, tid, where, stream=stream, row_offset=offset, backend=backend)
        np.testing.assert_array_equal(bits(f), bits(noise_spec.factor(seed, rows, rank, tid, draw, stream, offset, direction)))
    if isa:
        native.set_isa(None)


def test_ranks_nest_and_shards_agree(rng):
    seed, tid, draw = rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(28)
    whole = noise.factor(seed, 100, 64, tid, draw)
    assert torch.equal(noise.factor(seed, 37, 5, tid, draw, row_offset=21), whole[21:58, :5])
    for law in noise.LAWS:
        part = noise.dense(seed, 300, tid, draw, offset=13, law=law)
        assert torch.equal(part, noise.dense(seed, 400, tid, draw, law=law)[13:313])


def test_long_ranges_are_made_in_pieces(monkeypatch):
    def make():
        return *(noise.dense(3, 1000, 4, 5, offset=7, law=law) for law in noise.LAWS), noise.factor(3, 300, 9, 4, 5)

    whole = make()
    monkeypatch.setattr(noise, "_CHUNK", 16)
    assert all(map(torch.equal, make(), whole))


def test_moments_of_every_atom():
    """Exact statistics by enumerating the 1021 byte sums with their multiplicities (docs/noise.md states them)."""
    one = np.ones(256)
    multiplicity = np.convolve(np.convolve(one, one), np.convolve(one, one))
    p = multiplicity / multiplicity.sum()
    total = np.arange(1021)
    four = [np.minimum(np.maximum(total - 255 * i, 0), 255) for i in range(4)]
    words = sum(part.astype(np.int64) << 8 * i for i, part in enumerate(four))
    z = noise.normal(torch.from_numpy(words)).double().numpy()
    variance = (p * z**2).sum()
    assert abs((p * z).sum()) < 1e-12
    assert abs(variance - 0.99998) < 1e-5
    assert abs((p * z**4).sum() / variance**2 - 3.0) < 1e-3
    assert abs((p * z**6).sum() / variance**3 - 15.0) < 2e-2
    assert np.abs(z).max() < 4.9
    assert kolmogorov_distance(z, p) == pytest.approx(1.7e-3, abs=5e-5)
    tail = math.erfc(4 / math.sqrt(2))
    assert p[np.abs(z) > 4].sum() / tail == pytest.approx(0.91, abs=5e-3)
    grid = noise.to_grid(torch.from_numpy(z).float())
    assert torch.equal(grid, (grid * 256).round() / 256)
    assert torch.equal(grid.half().float(), grid)
    values, where = np.unique(grid.numpy(), return_inverse=True)
    assert kolmogorov_distance(values.astype(float), np.bincount(where, p)) == pytest.approx(2.1e-3, abs=5e-5)


def kolmogorov_distance(values, probabilities):
    """Largest difference of the distribution functions of atoms in ascending order and of N(0, 1), on either side of each atom."""
    normal = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in values])
    above = np.cumsum(probabilities)
    return max(np.abs(above - normal).max(), np.abs(above - probabilities - normal).max())


def test_streams_and_draws_are_uncorrelated(rng):
    seed, n = rng.getrandbits(64), 1 << 16
    z = [noise.dense(seed, n, tid, draw) for tid in (1, 2) for draw in (0, 1)]
    z += [noise.dense(seed, n, tid, draw, law="rademacher") for tid in (1, 2) for draw in (0, 1)]
    z += [noise.factor(seed, n, 1, 1, 0, stream=stream)[:, 0] for stream in "UV"]
    correlation = torch.corrcoef(torch.stack(z).double())
    off_diagonal = correlation - torch.eye(len(z))
    assert off_diagonal.abs().max() < 6 / n**0.5


def test_tensor_ids():
    assert noise.tensor_id("model.layers.0.weight") == noise.tensor_id("model.layers.0.weight")
    assert noise.tensor_ids(["a", "b", "a"]) == {"a": noise.tensor_id("a"), "b": noise.tensor_id("b")}


def test_names_that_share_an_id_are_hashed_again(monkeypatch):
    ids = {"a": 7, "b": 7, "c": 8, "b\0001": 8, "b\0002": 7, "b\0003": 9}
    monkeypatch.setattr(noise, "tensor_id", ids.__getitem__)
    assert noise.tensor_ids(["c", "b", "a"]) == noise.tensor_ids(["a", "b", "c"]) == {"a": 7, "b": 9, "c": 8}
    assert noise.tensor_ids(["b", "c"]) == {"b": 7, "c": 8}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.factor(0, 2, 0, 0, 0), "rank is 1 to 64, not 0"),
        (lambda: noise.factor(0, 2, 65, 0, 0), "rank is 1 to 64, not 65"),
        (lambda: noise.factor(-1, 2, 1, 0, 0), "seed is 0 to"),
        (lambda: noise.factor(0, 2, 1, 0, 1 << 28), "draw is 0 to"),
        (lambda: noise.factor(0, 2, 1, 1 << 32, 0), "tensor_id is 0 to"),
        (lambda: noise.factor(0, 2, 1, 0, 0, stream="Z"), "stream is 'U', 'V' or 'S'"),
        (lambda: noise.factor(0, 2, 1, 0, 0, row_offset=2**32 - 1), "outside 0 to"),
        (lambda: noise.dense(0, -1, 0, 0), "outside 0 to"),
        (lambda: noise.dense(0, 1, 0, 0, direction=1 << 24), "direction is 0 to"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
