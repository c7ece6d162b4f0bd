"""Tile sizes: files of them, and how the tuner chooses."""

import dataclasses
import json

import pytest
import torch

from lozo_kernels.bench import tune
from lozo_kernels.cli import command as cli
from lozo_kernels.kernels.backends.triton import TritonBackend, tilesizes
from lozo_kernels.kernels.backends.triton.tilesizes import KERNELS, TileSize

DEFAULT = {"kernel": "lowrank_update", "weights": "aligned", "rank_up_to": 64}
needs_interpreter = pytest.mark.skipif(
    TritonBackend().unavailable(torch.device("cpu")) is not None, reason="triton is not installed, or kernels run on a GPU here"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tilesizes.ENVIRONMENT, raising=False)
    tilesizes.tile_sizes.cache_clear()
    yield
    tilesizes.tile_sizes.cache_clear()


def test_the_default_covers_every_kernel_and_rank():
    for kernel in KERNELS:
        for rank in (0,) if kernel.startswith("dense") else range(1, 65):
            for aligned in (True, False):
                assert isinstance(tilesizes.tile_sizes(None).find(kernel, aligned, rank), TileSize)


def test_a_device_gets_its_own_file(tmp_path, monkeypatch):
    own = TileSize(128, 32, 8, 8)
    path = tilesizes.user_file("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"tiles": [DEFAULT | {"rows": 128, "cols": 32, "blocks": 8, "num_warps": 8}]}))
    assert tilesizes.tile_sizes("NVIDIA H200").find("lowrank_update", True, 4) == own
    # What the file leaves out, and other devices, are served by the default.
    assert tilesizes.tile_sizes("NVIDIA H200").find("dense_update", True, 0)
    assert tilesizes.tile_sizes("other").find("lowrank_update", True, 4) != own
    monkeypatch.setenv(tilesizes.ENVIRONMENT, str(path))
    tilesizes.tile_sizes.cache_clear()
    assert tilesizes.tile_sizes("other").find("lowrank_update", True, 4) == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        (json.dumps({"tiles": [DEFAULT]}), "KeyError"),
        (json.dumps({"tiles": [DEFAULT | {"kernel": "x", "rows": 1, "cols": 1, "blocks": 1, "num_warps": 1}]}), "unknown kernel"),
        (json.dumps({"tiles": [DEFAULT | {"rows": 48, "cols": 64, "blocks": 1, "num_warps": 4}]}), "rows of a tile is a power of"),
        (
            json.dumps({"tiles": [DEFAULT | {"rows": 32, "cols": 64, "blocks": 1, "num_warps": 4, "maxnreg": 16}]}),
            "maxnreg of a tile is from 32 to 255",
        ),
    ],
)
def test_bad_files(tmp_path, monkeypatch, content, message):
    path = tmp_path / "tiles.json"
    path.write_text(content)
    monkeypatch.setenv(tilesizes.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match=f"does not hold tile sizes.*{message}"):
        tilesizes.tile_sizes(None)


@needs_interpreter
def test_the_tuner_takes_what_is_faster_by_more_than_noise(tmp_path):
    sizes = {"lowrank_update": [TileSize(32, 32, 8, 4), TileSize(32, 64, 8, 4)]}

    def timer(calls):
        for call in calls.values():
            call()
        # The second candidate gains 20%, where there are candidates; elsewhere only the default is measured.
        return {name: 1.0 - (0.004, 0.0, 0.2)[i % 3] if i else 1.0 for i, name in enumerate(calls)}

    entries = tune.tune(torch.device("cpu"), shape="32x64", sizes_of=lambda kernel: sizes.get(kernel, []), timer=timer)
    chosen = {(e["kernel"], e["rank_up_to"]): TileSize(*(e[k] for k in ("rows", "cols", "blocks", "num_warps"))) for e in entries}
    assert chosen["lowrank_update", 16] == sizes["lowrank_update"][1]
    assert chosen["dense_update", 0] == tilesizes.tile_sizes(None).find("dense_update", True, 0)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": entries}))
    assert tilesizes.read(path).find("lowrank_update", True, 9) == sizes["lowrank_update"][1]


@needs_interpreter
def test_a_size_that_gives_other_bits_is_not_kept(monkeypatch):
    """The fastest candidate is wrong in one bit of one weight; the next one is kept."""
    wrong, right = TileSize(32, 32, 8, 4), TileSize(32, 64, 8, 4)
    run = tune.OpCall.run

    def broken(self):
        run(self)
        if self.backend._sizes.get("lowrank_update") == wrong:
            self.case.table.x[0].view(torch.int16)[0, -1, -1] ^= 1

    monkeypatch.setattr(tune.OpCall, "run", broken)
    sizes = {"lowrank_update": [wrong, right]}
    timed = []

    def timer(calls):
        timed.append(list(calls))
        return {name: 1.0 - 0.1 * i for i, name in enumerate(calls)}

    monkeypatch.setattr(tune, "cases", lambda: [("lowrank_update", 16)])
    (entry,) = tune.tune(torch.device("cpu"), shape="32x64", sizes_of=lambda kernel: sizes[kernel], timer=timer)
    assert timed == [["default", "32x64x8, 4 warps"]]
    assert (entry["rows"], entry["cols"]) == (right.rows, right.cols)


@needs_interpreter
def test_a_tuner_without_time_leaves_the_defaults(tmp_path):
    assert tune.tune(torch.device("cpu"), shape="32x64", seconds=-1.0) == []
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": []}))
    assert tilesizes.read(path).find("dense_update", True, 0) == tilesizes.tile_sizes(None).find("dense_update", True, 0)


def test_a_file_of_some_ranks_leaves_the_others_to_the_default(tmp_path):
    path = tmp_path / "tiles.json"
    own = TileSize(128, 32, 8, 8)
    path.write_text(json.dumps({"tiles": [DEFAULT | {"rank_up_to": 16, "rows": 128, "cols": 32, "blocks": 8, "num_warps": 8}]}))
    sizes, default = tilesizes.read(path), tilesizes.tile_sizes(None)
    assert sizes.find("lowrank_update", True, 16) == own
    for rank in (17, 32, 64):
        assert sizes.find("lowrank_update", True, rank) == default.find("lowrank_update", True, rank)


def test_candidates_fit_registers():
    for kernel in KERNELS:
        assert all(8 <= s.rows * s.cols // (32 * s.num_warps) <= 64 for s in tune.candidates(kernel))


def test_candidates_and_files_may_limit_registers(tmp_path):
    limited = [s for s in tune.candidates("lowrank_update") if s.maxnreg == 128]
    assert any(s.ahead for s in limited) and any(not s.ahead for s in limited)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": [DEFAULT | dataclasses.asdict(limited[0])]}))
    size = tilesizes.read(path).find("lowrank_update", True, 4)
    assert size == limited[0]
    plans = pytest.importorskip("lozo_kernels.kernels.backends.triton.plans")
    nvidia, amd = (plans.Target(dp4a=dp4a, eights=not dp4a, emulate=False) for dp4a in (True, False))
    assert plans.registers_of(size, nvidia, 255) == 128 and plans.registers_of(size, amd, 255) is None
    assert plans.registers_of(TileSize(32, 64, 16, 4), nvidia, 255) == 255


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_without_a_gpu_the_command_says_so(capsys):
    assert cli.main(["tune"]) == cli.EXIT_BAD_INPUT
    assert "there is none here" in capsys.readouterr().err
