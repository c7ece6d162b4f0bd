"""Files that are replaced whole, or not at all."""

import os
import threading

import pytest

from lozo_kernels.model.files import replacing, write_whole


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path, rng):
    path = tmp_path / "result.bin"
    for _ in range(3):
        data = rng.randbytes(rng.randrange(1, 5000))
        with replacing(path) as part:
            part.write_bytes(data)
            assert part.parent == tmp_path and part.name.startswith(".")
        assert path.read_bytes() == data and names(tmp_path) == ["result.bin"]


def test_text_is_utf_8(tmp_path):
    write_whole(tmp_path / "a.txt", "naïve Σ\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve Σ\n".encode()


@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_what_was_there(tmp_path, there):
    path = tmp_path / "a.txt"
    if there:
        path.write_text("old")
    before = names(tmp_path)
    with pytest.raises(RuntimeError, match="halfway"), replacing(path) as part:
        part.write_text("ne")
        raise RuntimeError("halfway")
    assert names(tmp_path) == before and (not there or path.read_text() == "old")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken(tmp_path, monkeypatch, links):
    """On file systems without links too."""

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.txt"
    with replacing(path, overwrite=False) as part:
        part.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(FileExistsError), replacing(path, overwrite=False) as part:
        part.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["a.txt"]


def test_one_of_several_at_once_gets_the_name(tmp_path):
    path, won = tmp_path / "a.txt", []
    barrier = threading.Barrier(4)

    def write(i):
        barrier.wait()
        try:
            with replacing(path, overwrite=False, suffix=str(i)) as part:
                part.write_text(str(i))
            won.append(i)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and path.read_text() == str(won[0]) and names(tmp_path) == ["a.txt"]
