"""Checkpoints appear whole or not at all, and are read without trust."""

import os
import pickle

import pytest
import torch

from nnunet_mim.checkpoint.format import load_checkpoint, save_atomically
from nnunet_mim.checkpoint.identity import merged_records
from nnunet_mim.errors import MiMError

CHECKPOINT = {"network_weights": {"w": torch.ones(3)}, "mim_config": {}, "provenance": {}}


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_former_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "checkpoint_latest.pth"
    save_atomically(CHECKPOINT, path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(MiMError, match=r"No space left on device.*free some disk space"):
        save_atomically({**CHECKPOINT, "network_weights": {"w": torch.zeros(3)}}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_latest.pth"]


class Trap:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path = tmp_path / "bad.pth"
    torch.save({**CHECKPOINT, "hook": Trap(tmp_path / "trap")}, path)
    with pytest.raises(MiMError, match=r"bad\.pth is no readable checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(MiMError, match=r"bad\.pth is no readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "trap").exists()


def test_another_file_of_torch(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(MiMError, match="was not written by mim_pretrain"):
        load_checkpoint(path)


def test_records_of_an_earlier_run_come_first_and_once():
    a, b = ({"dataset": "D", "case": case, "sha256": case} for case in "ab")
    assert merged_records([a], [b, a]) == [a, b]
