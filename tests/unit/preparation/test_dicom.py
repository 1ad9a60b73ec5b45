"""DICOM as it lies in the wild, written from a small real CT: what is in a series, and what is not."""

import locale
import re

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.dicom import read_series
from nnunet_mim.nnunet.raw_image import read_image
from nnunet_mim.preparation.finding import find_volumes
from nnunet_mim.preparation.screening import Header, read_header


@pytest.fixture
def real(shared_data):
    """A real abdomen, every fourth voxel."""
    return sitk.ReadImage(str(shared_data / "single" / "abdomen_image.nii.gz"))[::4, ::4, ::4]


def found(folder):
    """Header, or reason, of each volume by name."""
    return {volume.name: read_header(volume, 16) for volume in find_volumes([folder])}


def voxels(volume):
    return sitk.GetArrayFromImage(read_series(volume.files))


def test_a_localiser_inside_the_series_is_left_out_and_the_ct_kept(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    scout = sitk.DICOMOrient(real, "LSA")[:, :, :2]  # seen from the front
    dicom(scout, tmp_path / "scan" / "s", uid="1.5", **{"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"})
    for file in (tmp_path / "scan" / "s").iterdir():
        file.rename(tmp_path / "scan" / f"scout_{file.name}")
    ct, other = find_volumes([tmp_path / "scan"])
    assert (ct.name, other.name) == ("scan", "scan_2")
    assert read_header(ct, 16).size == real.GetSize()[::-1]
    assert np.array_equal(voxels(ct), sitk.GetArrayFromImage(real))
    assert read_header(other, 16) == "a localiser"
    assert len(other.files) == 2


def test_few_slices_of_another_direction_are_a_volume_of_their_own(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    dicom(sitk.DICOMOrient(real, "LSA")[:, :, :3], tmp_path / "scan" / "s", uid="1.5")
    for file in (tmp_path / "scan" / "s").iterdir():
        file.rename(tmp_path / "scan" / f"other_{file.name}")
    headers = found(tmp_path / "scan")
    assert headers["scan"].warnings == (
        "slices of another size or direction are in its series (3), taken for other images",
    )
    assert headers["scan_2"].startswith("fewer than 16 slices")


@pytest.mark.parametrize("tag", ["0020|0012", "0020|0100", "0008|0032"])
def test_two_phases_in_one_series_are_told_apart(tmp_path, real, dicom, tag):
    later = sitk.Cast(real + 40, sitk.sitkInt16)
    dicom(real, tmp_path / "scan", uid="1.5", **{tag: "100000"})
    dicom(later, tmp_path / "scan" / "s", uid="1.5", **{tag: "110000"})
    for file in (tmp_path / "scan" / "s").iterdir():
        file.rename(tmp_path / "scan" / f"later_{file.name}")
    one, two = find_volumes([tmp_path / "scan"])
    assert np.array_equal(voxels(one), sitk.GetArrayFromImage(real))
    assert np.array_equal(voxels(two), sitk.GetArrayFromImage(later))
    assert all(isinstance(read_header(volume, 16), Header) for volume in (one, two))


def test_repeats_that_nothing_tells_apart(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    dicom(real + 40, tmp_path / "scan" / "s", uid="1.5", **{"0008|0018": None})
    for file in (tmp_path / "scan" / "s").iterdir():
        file.rename(tmp_path / "scan" / f"later_{file.name}")
    n = real.GetDepth()
    assert found(tmp_path / "scan") == {
        "scan": f"repeated slices ({n}, and no acquisition number or time tells them apart)"
    }


def test_a_copy_of_a_slice_is_taken_once_and_said(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    for file in sorted((tmp_path / "scan").iterdir())[:3]:
        file.with_name(f"copy of {file.name}").write_bytes(file.read_bytes())
    (volume,) = find_volumes([tmp_path / "scan"])
    assert read_header(volume, 16).warnings == ("3 slices are there twice (the same file): taken once",)
    assert np.array_equal(voxels(volume), sitk.GetArrayFromImage(real))


def write_enhanced(image, path, kind="1.2.840.10008.5.1.4.1.1.2.1"):
    """Write all slices into one file of many frames, as Enhanced CT."""
    before = locale.setlocale(locale.LC_ALL)
    image = sitk.Image(sitk.Cast(image, sitk.sitkInt16))
    for key, value in {
        "0008|0016": kind, "0008|0060": "CT", "0020|000e": "1.7", "0020|000d": "1.2.3", "0008|0018": "1.7.1",
        "0008|0008": "ORIGINAL\\PRIMARY\\VOLUME", "0028|1052": "-1024", "0028|1053": "1",
    }.items():  # fmt: skip
        image.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)
    locale.setlocale(locale.LC_ALL, before)


def test_enhanced_ct_in_one_file(tmp_path, real):
    (tmp_path / "scan").mkdir()
    write_enhanced(real, tmp_path / "scan" / "all.dcm")
    (volume,) = find_volumes([tmp_path / "scan"])
    header = read_header(volume, 16)
    assert header.size == real.GetSize()[::-1]
    assert header.spacing == pytest.approx(real.GetSpacing()[::-1])
    taken = read_series(volume.files)
    assert np.array_equal(sitk.GetArrayFromImage(taken), sitk.GetArrayFromImage(real))
    assert taken.GetOrigin() == pytest.approx(real.GetOrigin(), abs=1e-3)
    assert taken.GetDirection() == pytest.approx(real.GetDirection(), abs=1e-6)


def test_frames_in_another_order_are_no_volume(tmp_path, real):
    """SimpleITK takes them in the order in which they are stored."""
    write_enhanced(real, tmp_path / "all.dcm")
    content = (tmp_path / "all.dcm").read_bytes()
    places = re.findall(rb"\x20\x002\x00....([-0-9.]+\\[-0-9.]+\\[-0-9.]+ *)", content, re.DOTALL)
    assert len(places) == real.GetDepth()
    one, other = places[0], next(p for p in reversed(places) if len(p) == len(places[0]))
    assert one != other
    content = content.replace(one, b"<first place>").replace(other, one)
    (tmp_path / "all.dcm").write_bytes(content.replace(b"<first place>", other))
    (reason,) = found(tmp_path).values()
    assert reason.startswith("slices are missing") or reason == "its frames are not in the order of their places"


def test_hidden_names_no_ending_and_no_preamble_are_taken(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    for number, file in enumerate(sorted((tmp_path / "scan").iterdir())):
        content = file.read_bytes()
        file.unlink()
        if number % 3 == 0:
            file.with_name(f".IM{number:04d}").write_bytes(content)
        elif number % 3 == 1:
            file.with_name(f"IM{number:04d}").write_bytes(content)
        else:
            file.with_name(f"IM{number:04d}").write_bytes(content[content.index(b"\x08\x00\x08\x00") :])
    (tmp_path / "scan" / "._IM0001").write_bytes(bytes(128) + b"DICM")
    (volume,) = find_volumes([tmp_path])
    assert read_header(volume, 16).size == real.GetSize()[::-1]
    assert np.array_equal(voxels(volume), sitk.GetArrayFromImage(real))


@pytest.mark.parametrize(("kind", "says"), [("481.3", "an RTSTRUCT"), ("88.11", "an SR"), ("104.1", "a document")])
def test_dicom_without_an_image_is_named_in_our_words(tmp_path, kind, says):
    uid = f"1.2.840.10008.5.1.4.1.1.{kind}".encode()
    uid += b"\0" * (len(uid) % 2)
    meta = b"\x02\x00\x02\x00UI" + len(uid).to_bytes(2, "little") + uid
    meta += b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
    head = b"\x02\x00\x00\x00UL\x04\x00" + len(meta).to_bytes(4, "little")
    body = b"\x08\x00\x16\x00UI" + len(uid).to_bytes(2, "little") + uid
    (tmp_path / "object.dcm").write_bytes(bytes(128) + b"DICM" + head + meta + body)
    (tmp_path / "empty.dcm").touch()
    assert set(found(tmp_path).values()) == {f"no image ({says})", "cannot be read (the file is empty)"}


def test_a_nifti_pair_is_taken_and_analyze_named(tmp_path, real):
    sitk.WriteImage(real, str(tmp_path / "pair.hdr"))
    head = (tmp_path / "pair.hdr").read_bytes()
    (tmp_path / "old.hdr").write_bytes(head[:344] + bytes(4))
    (tmp_path / "old.img").write_bytes((tmp_path / "pair.img").read_bytes())
    (tmp_path / "lonely.hdr").write_bytes(head)
    headers = found(tmp_path)
    assert headers["pair"].size == real.GetSize()[::-1]
    assert headers["old"] == "no NIfTI pair (Analyze says no orientation): convert it to NIfTI"
    assert headers["lonely"] == "cannot be read (there is no .img file beside it)"


def test_mim_inspect_reads_a_dicom_folder(tmp_path, real, dicom):
    dicom(real, tmp_path / "scan", uid="1.5")
    image = read_image([tmp_path / "scan"])
    assert image.name == "scan"
    assert np.array_equal(image.voxels[0], sitk.GetArrayFromImage(real))
    assert image.spacing == pytest.approx(real.GetSpacing()[::-1])
    assert image.grid.origin == pytest.approx(real.GetOrigin(), abs=1e-3)
