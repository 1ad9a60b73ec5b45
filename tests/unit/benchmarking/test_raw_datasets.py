"""From archives to nnU-Net datasets, which appear whole or not at all."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.benchmarking import raw_datasets
from nnunet_mim.benchmarking.archives import BTCV_LABELS
from nnunet_mim.benchmarking.cli import main

VERIFY = """
import sys
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
if __name__ == "__main__":
    for folder in sys.argv[1:]:
        verify_dataset_integrity(folder, 1)
"""


@pytest.mark.long
def test_both_kinds_become_datasets_that_nnunet_accepts(folders, msd, btcv, capsys):
    command = ["prepare", "--msd", str(msd), "--btcv", str(btcv), "--splits", "-np", "1", "--partial"]
    (msd / "labelsTr" / "spleen_4.nii.gz").rename(msd / "later")  # --partial leaves out the image too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_mim.benchmarking.splits.N_FOLDS", 2)
        assert main(command) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert "Dataset009_Spleen: 2 of 3 published training cases, made" in printed
        assert "Dataset220_BTCV: 30 of 30 published training cases, made" in printed
        assert "next: mim_prepare -d 9 220" in printed
        made = {path.name for path in folders.iterdir() if path.suffix != ".lock"}
        assert made == {"Dataset009_Spleen", "Dataset220_BTCV"}

        before = {path: path.stat().st_mtime_ns for path in folders.rglob("*.nii.gz")}
        assert main(command) == 0  # a second run does nothing
        assert "there already" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in folders.rglob("*.nii.gz")}

    script = folders.parent / "verify.py"
    script.write_text(VERIFY)
    done = subprocess.run(
        [sys.executable, str(script), *(str(folders / name) for name in sorted(made))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verify_dataset_integrity Done") == 2
    assert "rror:" not in done.stdout
    assert "mismatch" not in done.stdout

    spleen, abdomen = (json.loads((folders / name / "dataset.json").read_text()) for name in sorted(made))
    assert (spleen["labels"], spleen["channel_names"]) == ({"background": 0, "spleen": 1}, {"0": "CT"})
    assert (abdomen["labels"], abdomen["channel_names"]) == (BTCV_LABELS, {"0": "CT"})
    assert len(abdomen["labels"]) == 14
    images = {path.name for path in (folders / "Dataset009_Spleen").glob("images*/*")}
    assert images == {f"spleen_{number}_0000.nii.gz" for number in (1, 2, 3, 7)}
    image, label = (folders / "Dataset220_BTCV" / name for name in ("imagesTr", "labelsTr"))
    assert (image / "img0021_0000.nii.gz").samefile(btcv / "Training" / "img" / "img0021.nii.gz")
    assert (label / "img0021.nii.gz").read_bytes() == (btcv / "Training" / "label" / "label0021.nii.gz").read_bytes()
    preprocessed = folders.parent / "nnUNet_preprocessed"
    assert len(json.loads((preprocessed / "Dataset220_BTCV" / "splits_final.json").read_text())) == 6
    assert len(json.loads((preprocessed / "Dataset009_Spleen" / "splits_final.json").read_text())) == 2


def test_what_is_there_is_not_replaced(folders, btcv, capsys):
    other = folders.parent / "nnUNet_results" / "Dataset220_Mine"
    other.mkdir()
    assert main(["prepare", "--btcv", str(btcv)]) == 2
    assert "number 220 is taken by Dataset220_Mine" in capsys.readouterr().err
    other.rmdir()
    (folders / "Dataset220_BTCV" / "labelsTr").mkdir(parents=True)
    assert main(["prepare", "--btcv", str(btcv)]) == 2
    assert "Dataset220_BTCV is there already with 0 cases" in capsys.readouterr().err
    shutil.rmtree(folders / "Dataset220_BTCV")
    splits = folders.parent / "nnUNet_preprocessed" / "Dataset220_BTCV" / "splits_final.json"
    splits.parent.mkdir()
    splits.write_text("[]")
    assert main(["prepare", "--btcv", str(btcv), "--splits"]) == 2
    assert f"{splits} holds other splits" in capsys.readouterr().err
    assert splits.read_text() == "[]"
    assert not (folders / "Dataset220_BTCV").exists()


def test_no_space(btcv, refused, monkeypatch):
    monkeypatch.setattr(raw_datasets.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))
    monkeypatch.setattr(raw_datasets, "_linkable", lambda archive, raw: False)
    assert "make space" in refused("--btcv", btcv)


def test_a_conversion_that_fails_leaves_nothing(folders, btcv, monkeypatch, refused):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(raw_datasets, "_link_or_copy", full)
    assert "No space left on device" in refused("--btcv", btcv)


def test_msd_becomes_what_the_converter_of_nnunet_makes_of_it(folders, msd, tmp_path):
    """Byte by byte, and the description key by key."""
    assert main(["prepare", "--msd", str(msd), "-np", "1"]) == 0
    convert = "from nnunetv2.dataset_conversion.convert_MSD_dataset import entry_point as run"
    code = f"{convert}\nif __name__ == '__main__':\n    run()"
    (tmp_path / "convert.py").write_text(code)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment["nnUNet_raw"] = str(tmp_path)
    command = [sys.executable, str(tmp_path / "convert.py"), "-i", str(msd), "-np", "1"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    ours, theirs = folders / "Dataset009_Spleen", tmp_path / "Dataset009_Spleen"
    files = {path.relative_to(ours): path.read_bytes() for path in ours.glob("*/*")}
    assert len(files) == 8
    assert files == {path.relative_to(theirs): path.read_bytes() for path in theirs.glob("*/*")}
    assert json.loads((ours / "dataset.json").read_text()) == json.loads((theirs / "dataset.json").read_text())
    assert (ours / "imagesTs" / "spleen_7_0000.nii.gz").samefile(msd / "imagesTs" / "spleen_7.nii.gz")


def test_copies_where_links_are_impossible(folders, btcv, monkeypatch):
    def forbidden(source, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(raw_datasets.os, "link", forbidden)
    assert main(["prepare", "--btcv", str(btcv), "--btcv_id", "7"]) == 0
    image = folders / "Dataset007_BTCV" / "imagesTr" / "img0040_0000.nii.gz"
    original = btcv / "Training" / "img" / "img0040.nii.gz"
    assert image.read_bytes() == original.read_bytes()
    assert not image.samefile(original)


def test_what_a_killed_one_left_is_removed(folders, btcv):
    left = folders / ".mim_benchmark_Dataset220_BTCV-999999999" / "Dataset220_BTCV" / "imagesTr"
    left.mkdir(parents=True)
    (left / "img0001_0000.nii.gz").write_bytes(b"half")
    assert main(["prepare", "--btcv", str(btcv)]) == 0
    assert {path.name for path in folders.iterdir() if path.is_dir()} == {"Dataset220_BTCV"}
    assert len(list((folders / "Dataset220_BTCV").glob("*/*.nii.gz"))) == 60


def test_labels_get_the_geometry_of_their_images(folders, btcv, volumes):
    """With --ignore_origin; nnU-Net's readers would turn them against their images. The archive stays as it is."""
    source = btcv / "Training" / "label" / "label0002.nii.gz"
    turned, voxels = (-1, 0, 0, 0, -1, 0, 0, 0, 1), volumes.organs(13)
    volumes.write(source, voxels, origin=(0.0, 0.0, 0.0), direction=turned)
    before = source.read_bytes()
    assert main(["prepare", "--btcv", str(btcv), "--ignore_origin"]) == 0
    assert source.read_bytes() == before
    made = folders / "Dataset220_BTCV"
    image, label = (
        sitk.ReadImage(str(made / name)) for name in ("imagesTr/img0002_0000.nii.gz", "labelsTr/img0002.nii.gz")
    )
    assert label.GetDirection() == image.GetDirection()
    assert label.GetOrigin() == image.GetOrigin()
    assert np.array_equal(sitk.GetArrayFromImage(label), voxels)
    assert (made / "labelsTr" / "img0001.nii.gz").samefile(source.with_name("label0001.nii.gz")), "others are links"
