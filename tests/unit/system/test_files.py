"""A file is replaced as a whole or not at all."""

import os

import pytest

from nnunet_mim.system.files import atomic_file, write_atomically


def test_the_former_file_stays_until_all_is_written(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path, temporary):
    with atomic_file(path, temporary) as file:
        file.write(b"new")
        assert temporary.exists()
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, tmp_path / "b.tmp")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]
