"""Weights that come with the package: their name stands for a checkpoint everywhere, and they are what they claim."""

import hashlib

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient

from nnunet_mim.checkpoint import locate as where
from nnunet_mim.checkpoint.format import PretrainedCheckpoint, load_checkpoint
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.checkpoint.locate import CARD, CONFIG, SHIPPED, WEIGHTS, find_checkpoint, locate, shipped_weights
from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.cli import main

NAMES = shipped_weights()


def test_there_are_some():
    assert "tiny-ct" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_whole_and_described(name):
    stored = load_checkpoint(name)
    assert all(weight.dtype == torch.float32 for weight in stored["network_weights"].values())
    assert sum(path.stat().st_size for path in (SHIPPED / name).iterdir()) < 9e6, "8 MB once the wheel has packed it"
    assert {path.name for path in (SHIPPED / name).iterdir()} == {WEIGHTS, CONFIG, CARD}
    card = (SHIPPED / name / CARD).read_text()
    for said in ("license:", "CC BY", "MIT", "Apache-2.0", "iterations", "good for"):
        assert said in card, said
    assert stored["provenance"]["cases"], "or nobody could see what was pretrained on"
    assert all(case["case"] == "" for case in stored["provenance"]["cases"])


@pytest.mark.parametrize("name", NAMES)
def test_they_have_not_seen_test_cases(name, shared_data):
    seen = {case.get("image_sha256") for case in load_checkpoint(name)["provenance"]["cases"]}
    images = [path for number in (501, 504) for path in shared_data.glob(f"nnUNet_raw/Dataset{number}_*/images*/*.gz")]
    assert len(images) >= 100
    assert None not in seen
    reader = SimpleITKIOWithReorient()
    assert not {voxel_sha256(reader.read_images([str(path)])[0]) for path in images} & seen


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_is_that_of_its_preset(name):
    """So `--preset` and the plans of `mim_plan --preset` fit it."""
    checkpoint = PretrainedCheckpoint.load(name)
    preset = PRESETS[checkpoint.preset]
    assert (checkpoint.network.embed_dims, checkpoint.network.depths) == (preset.embed_dims, preset.depths)
    assert checkpoint.path == name, "plans and settings keep the name: the folder may be elsewhere tomorrow"
    plans = {"pretrain_info": {"checkpoint_path": checkpoint.path}}
    assert find_checkpoint(plans, "3d_fullres", 0, "nowhere") == SHIPPED / name


def test_what_lies_here_goes_before_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("tiny-ct") == SHIPPED / "tiny-ct"
    (tmp_path / "tiny-ct").write_bytes(b"a file of the user")
    assert locate("tiny-ct") == tmp_path / "tiny-ct"


def test_an_unknown_name_is_told_of_them(monkeypatch, tmp_path):
    with pytest.raises(MiMError, match="tiny-cd does not exist: correct the path or give tiny-ct"):
        locate("tiny-cd")
    monkeypatch.setattr(where, "SHIPPED", tmp_path)
    with pytest.raises(MiMError, match=r"does not exist: correct the path$"):
        locate("tiny-ct")


def test_they_are_listed_with_size_licence_and_checksum(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--list_weights"])
    assert not ended.value.code
    said = capsys.readouterr().out
    for name in NAMES:
        content = (SHIPPED / name / WEIGHTS).read_bytes()
        (line,) = [line for line in said.splitlines() if line.split()[0] == name]
        assert hashlib.sha256(content).hexdigest() in line
        assert f"{len(content) / 1e6:.1f}" in line
        assert "cc-by" in line


def test_half_precision_costs_three_digits(tmp_path):
    """float16 keeps 11 bits: every weight within 2⁻¹¹ of itself."""
    from nnunet_mim.inspection.export_cli import main as export

    assert export(["tiny-ct", "-o", str(tmp_path / "a"), "--half"]) == 0
    before, after = load_checkpoint("tiny-ct")["network_weights"], load_checkpoint(tmp_path / "a")["network_weights"]
    assert (tmp_path / "a" / WEIGHTS).stat().st_size < 2.1 * sum(w.numel() for w in before.values())
    for name, weight in before.items():
        assert np.allclose(weight, after[name], rtol=2**-11, atol=2**-24), name
