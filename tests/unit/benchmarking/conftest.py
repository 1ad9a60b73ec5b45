"""Made-up archives of MSD and BTCV with the real layouts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.benchmarking.archives import BTCV_CASES, MSD_CASES
from nnunet_mim.benchmarking.cli import main

SPACING, ORIGIN = (0.8, 0.8, 2.5), (-120.5, 33.25, 400.0)


def write(path, voxels, spacing=SPACING, origin=ORIGIN, direction=None):
    """Voxels (z, y, x), or with a fourth axis in front, as a NIfTI file; spacing and origin in mm (x, y, z)."""
    image = sitk.GetImageFromArray(voxels, isVector=False)
    extra = (1.0,) * (voxels.ndim - 3)
    image.SetSpacing((*spacing, *extra))
    image.SetOrigin((*origin, *(0.0 for _ in extra)))
    if direction is not None:
        image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def ct(seed=0, shape=(8, 8, 8)):
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def organs(highest, shape=(8, 8, 8)):
    return (np.arange(np.prod(shape)) % (highest + 1)).astype(np.uint8).reshape(shape)


@pytest.fixture
def volumes():
    """write(path, voxels, spacing=…, origin=…, direction=…), ct(seed, shape), organs(highest, shape) and
    write_msd(folder, count)
    """
    return SimpleNamespace(write=write, ct=ct, organs=organs, write_msd=write_msd)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's folders, empty, and a Task09_Spleen of three published cases; returns nnUNet_raw."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setitem(MSD_CASES, "Task09_Spleen", 3)
    return tmp_path / "nnUNet_raw"


@pytest.fixture
def msd(tmp_path):
    """Task09_Spleen as extracted on a computer that macOS has seen: 3 training cases, 2 test images."""
    return write_msd(tmp_path / "download" / "Task09_Spleen", 3)


def write_msd(folder, count):
    names = [f"spleen_{number}.nii.gz" for number in range(2, 2 + count)]
    for number, name in enumerate(names):
        write(folder / "imagesTr" / name, ct(number))
        write(folder / "labelsTr" / name, organs(1))
    for name in ("spleen_1.nii.gz", "spleen_7.nii.gz"):
        write(folder / "imagesTs" / name, ct(9))
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part / "._spleen_2.nii.gz").write_bytes(b"\0\5\x16\7Mac OS X")
    (folder / "._dataset.json").write_bytes(b"\0\5\x16\7Mac OS X")
    description = {
        "name": "Spleen", "description": "Spleen Segmentation", "licence": "CC-BY-SA 4.0", "release": "1.0 06/08/2018",
        "tensorImageSize": "3D", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen"},
        "numTraining": count, "numTest": 2,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": ["./imagesTs/spleen_1.nii.gz", "./imagesTs/spleen_7.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def btcv(tmp_path):
    """RawData of BTCV, all 30 training cases."""
    folder = tmp_path / "Abdomen" / "RawData"
    for number, case in enumerate(BTCV_CASES):
        write(folder / "Training" / "img" / f"{case}.nii.gz", ct(number))
        write(folder / "Training" / "label" / f"label{case[3:]}.nii.gz", organs(13))
    (folder / "Testing" / "img").mkdir(parents=True)
    return folder


@pytest.fixture
def refused(folders, capsys):
    """refused(*arguments): the one line with which the command ends; nothing but locks may have been written."""

    def run(*arguments):
        assert main(["prepare", *map(str, arguments), "-np", "2"]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert lines[-1] == error
        assert not [path for path in folders.iterdir() if path.suffix != ".lock"]
        return error

    return run
