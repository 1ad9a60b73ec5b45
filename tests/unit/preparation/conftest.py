"""Images and DICOM series to prepare, made on the spot."""

import locale
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.demo.phantoms import make_phantom


def body(seed=0, shape=(24, 28, 32), spacing=(4.0, 3.0, 3.0)):
    """A made-up CT (z, y, x) as a SimpleITK image; spacing in mm, array order."""
    hu, _ = make_phantom(seed, shape)
    image = sitk.GetImageFromArray(np.round(hu).astype(np.int16))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-40.0, 12.5, 100.0))
    return image


@pytest.fixture
def ct():
    """ct(seed, shape, spacing): a made-up CT."""
    return body


def write_dicom(image, folder, uid="1.2.3.4", modality="CT", leave_out=(), **tags):
    """Write an image as a DICOM series of axial slices, stored values being HU + 1024."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)  # writing DICOM changes it, and with it the encoding of text files
    direction = image.GetDirection()
    shared = {
        "0008|0060": modality,
        "0020|000e": uid,
        "0020|000d": "1.2.3",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0028|1052": "-1024",
        "0028|1053": "1",
        "0020|0037": "\\".join(f"{direction[i]:g}" for i in (0, 3, 6, 1, 4, 7)),
        **tags,
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(image.GetDepth()):
        if number in leave_out:
            continue
        piece = sitk.Cast(image[:, :, number], sitk.sitkInt16)
        place = image.TransformIndexToPhysicalPoint((0, 0, number))
        for key, value in {
            **shared,
            "0020|0032": "\\".join(f"{v:.6f}" for v in place),
            "0020|0013": str(number),
            "0008|0018": f"{uid}.{number}",
        }.items():
            if value is not None:
                piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"IM{(number * 7) % 100:03d}_{number}.dcm"))  # not in the order of the slices
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def dicom():
    """dicom(image, folder, uid=…, modality=…, leave_out=…, **tags)"""
    return write_dicom


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty; returns their parent."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return Path(tmp_path)
