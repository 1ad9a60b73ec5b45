"""Checkpoints appear whole or not at all, and are read without trust."""

import os
import pickle

import pytest
import torch

from nnunet_mim.checkpoint.format import (
    HYBRID_KEYS,
    RESENC_KEYS,
    PretrainedCheckpoint,
    load_checkpoint,
    save_atomically,
)
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
    refused = rf"bad\.pth is refused: loading it would run {os.mkdir.__module__}\.mkdir"
    with pytest.raises(MiMError, match=rf"{refused} \(first after 'hook'\)"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Trap(tmp_path / "trap")))
    with pytest.raises(MiMError, match=refused):
        load_checkpoint(path)
    assert not (tmp_path / "trap").exists()


def test_another_file_of_torch(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(MiMError, match="was not written by mim_pretrain"):
        load_checkpoint(path)


def test_what_is_read(make_checkpoint, network_config):
    path, encoder = make_checkpoint()
    checkpoint = PretrainedCheckpoint.load(path)
    assert (checkpoint.network, checkpoint.in_channels, checkpoint.view_size) == (network_config, 1, (32, 32, 32))
    assert set(checkpoint.encoder) == set(encoder.state_dict())
    assert "tensor" not in repr(checkpoint)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_content(path):
    torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, path)


def no_encoder(path):
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "network_weights": {"decoder.a": torch.zeros(1)}}, path)


def no_network(path):
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "mim_config": {"preset": "tiny"}}, path)


def no_tensors(path):
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "network_weights": {"encoder.a": 1}}, path)


def other_setting(path):
    stored = torch.load(path, weights_only=True)
    stored["mim_config"]["network"]["n_experts"] = 8
    torch.save(stored, path)


def config_of_another_kind(path):
    stored = torch.load(path, weights_only=True)
    torch.save({**stored, "mim_config": [1]}, path)


def text_file(path):
    path.write_text("hello\n")


def code(path):
    torch.save({"network_weights": {}, "mim_config": PickledCode()}, path)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


class PickledCode:
    def __reduce__(self):
        return (print, ("this must never run",))


DAMAGES = [
    truncate, other_content, no_encoder, no_network, no_tensors, other_setting, config_of_another_kind, text_file, code,
    flipped,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_a_pretraining_checkpoint_is_refused_in_one_line(make_checkpoint, damage, capsys):
    path, _ = make_checkpoint()
    damage(path)
    for load in (PretrainedCheckpoint.load, load_checkpoint):
        with pytest.raises(MiMError) as error:
            load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    assert "must never run" not in capsys.readouterr().out


def test_missing_file(tmp_path):
    with pytest.raises(MiMError, match="does not exist"):
        PretrainedCheckpoint.load(tmp_path / "nothing.pth")


def test_finetuning_reads_checkpoints_that_do_not_say_where_they_come_from(make_checkpoint):
    path, _ = make_checkpoint()
    stored = torch.load(path, weights_only=True)
    for provenance in ({}, {"provenance": None}):
        del stored["provenance"]
        stored |= provenance
        torch.save(stored, path)
        assert PretrainedCheckpoint.load(path).provenance == {}
        with pytest.raises(MiMError, match="was not written by mim_pretrain, it lacks provenance"):
            load_checkpoint(path)
        stored["provenance"] = {}


def test_both_networks_name_their_parts_with_the_same_keys():
    assert HYBRID_KEYS.keys() == RESENC_KEYS.keys()
