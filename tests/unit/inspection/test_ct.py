"""Raw CT becomes what nnU-Net's own preprocessing would make of it, at the place where it was."""

from __future__ import annotations

import locale
import os
import re
import sys
import zlib

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import preprocess
from nnunet_mim.nnunet import raw_image
from nnunet_mim.nnunet.image_files import case_name
from nnunet_mim.nnunet.raw_image import Grid, read_image


def test_preprocessing_is_that_of_the_dataset(shared_data, tmp_path) -> None:
    """The same voxels as nnU-Net's command makes with real plans."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    path = shared_data / "single" / "abdomen_image.nii.gz"
    window = {"0": {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}}
    options = {"order": 3, "order_z": 0, "force_separate_z": None}
    plans = {
        "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2], "image_reader_writer": "SimpleITKIO",
        "foreground_intensity_properties_per_channel": window,
        "configurations": {"3d_fullres": {
            "spacing": [4.5, 4.0, 5.0], "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
            "resampling_fn_data": "resample_data_or_seg_to_shape", "architecture": {},
            "resampling_fn_data_kwargs": {"is_seg": False, **options},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {"is_seg": True, **options, "order": 1},
        }},
    }  # fmt: skip
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    expected = DefaultPreprocessor(verbose=False).run_case([str(path)], None, manager, configuration, {})[0]
    provenance = {"spacing": [4.5, 4.0, 5.0], "normalization": ["CTNormalization"], "intensity_properties": window,
                  "transpose_forward": [1, 0, 2], "configuration": "3d_fullres"}  # fmt: skip
    voxels, grid = preprocess(read_image([path]), provenance)
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_allclose(np.linalg.norm(grid.steps, axis=0), [4.5, 4.0, 5.0], rtol=0.02)


def test_order_of_axes_and_spacing_come_from_the_checkpoint(write_checkpoint, write_ct) -> None:
    image = read_image([write_ct()])  # 72 x 50 x 60 voxels of 2 x 4 x 3 mm after transposing (z, y, x) to (y, z, x)
    provenance = load_checkpoint(write_checkpoint((4.0, 4.0, 3.0), (1, 0, 2)))["provenance"]
    voxels, grid = preprocess(image, provenance)
    assert voxels.shape == (1, 36, 50, 60)
    np.testing.assert_allclose(grid.steps, [[0, 0, 3], [4, 0, 0], [0, 4, 0]])
    np.testing.assert_allclose(grid.origin, (-120, 37 + 1, 411))


def test_unknown_spacing(write_checkpoint, write_ct) -> None:
    image = read_image([write_ct()])
    provenance = load_checkpoint(write_checkpoint(()))["provenance"]
    assert preprocess(image, provenance)[0].shape == (1, 50, 72, 60)
    assert preprocess(image, provenance, (8.0, 4.0, 3.0))[0].shape == (1, 25, 36, 60)


def test_grid_of_larger_and_smaller_voxels() -> None:
    grid = Grid(np.array([10.0, 20.0, 30.0]), np.diag([1.0, 2.0, 3.0]))
    larger = grid.part((4, 0, -2), (2, 1, 4))
    np.testing.assert_allclose(larger.origin, (10 + 4.5, 20, 30 + 3 * (-2 + 1.5)))
    np.testing.assert_allclose(larger.steps, np.diag([2, 2, 12]))
    back = larger.part((0, 0, 0), (0.5, 1, 0.25))
    np.testing.assert_allclose(back.origin, grid.part((4, 0, -2), (1, 1, 1)).origin)


def refused(path, content=None, **image) -> str:
    if content is not None:
        path.write_bytes(content)
    elif image:
        array, vector = image["array"], image.get("vector", False)
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    with pytest.raises(MiMError) as error:
        read_image([path])
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_what_cannot_be_used_is_named(tmp_path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.nii.gz")
    assert "is a folder without a CT" in refused(tmp_path)
    assert "is damaged" in refused(tmp_path / "text.nii.gz", b"no image at all")
    assert "cannot read" in refused(tmp_path / "table.csv", b"1,2,3")
    grey = np.ones((6, 6), np.uint8)
    assert "no volume (size 6 × 6)" in refused(tmp_path / "flat.png", array=grey)
    assert "no volume (size 6 × 6 × 1)" in refused(tmp_path / "slice.mha", array=grey[None])
    assert "(colour)" in refused(tmp_path / "colour.mha", array=np.ones((5, 6, 6, 3), np.uint8), vector=True)
    hot = np.ones((4, 4, 4), np.float32)
    hot[0, 0, 0] = np.nan
    assert "NaN" in refused(tmp_path / "hot.mha", array=hot)
    assert "nothing but zeros" in refused(tmp_path / "empty.mha", array=np.zeros((4, 4, 4), np.int16))


def test_a_damaged_file(tmp_path, write_ct) -> None:
    whole = write_ct().read_bytes()
    assert "is damaged" in refused(tmp_path / "cut.nii.gz", whole[: len(whole) // 2])


def small_dicom(path) -> bytes:
    before = locale.setlocale(locale.LC_ALL)  # writing DICOM changes it, and with it the encoding of text files
    sitk.WriteImage(sitk.Image([40, 40], sitk.sitkInt16), str(path))
    locale.setlocale(locale.LC_ALL, before)
    return path.read_bytes()


def test_a_small_file_that_promises_much_is_refused_by_its_header(tmp_path) -> None:
    """Rows and columns of 20000, and no more pixels than before: SimpleITK takes gigabytes to read it."""
    content = small_dicom(tmp_path / "small.dcm")
    for tag in (b"\x28\x00\x10\x00\x02\x00\x00\x00", b"\x28\x00\x11\x00\x02\x00\x00\x00"):
        at = content.index(tag) + len(tag)
        content = content[:at] + (20000).to_bytes(2, "little") + content[at + 2 :]
    for name in ("bomb.dcm", "without_ending"):
        assert "is damaged (its header promises 800 MB of voxels" in refused(tmp_path / name, content)
    volume = "ObjectType = Image\nNDims = 3\nDimSize = 9000 9000 9000\nElementType = MET_SHORT\nCompressedData = True\n"
    content = f"{volume}ElementDataFile = LOCAL\n".encode() + zlib.compress(bytes(1000))
    assert "is damaged (its header promises 1,458,000 MB of voxels" in refused(tmp_path / "bomb.mha", content)


def test_what_is_no_volume_is_refused_before_its_voxels_are_read(tmp_path, monkeypatch) -> None:
    """Also of kinds whose headers mim_prepare does not look at."""
    monkeypatch.setattr(raw_image, "read_series", lambda _: pytest.fail("reads voxels"))
    small_dicom(tmp_path / "slice.dcm")
    sitk.WriteImage(sitk.Image([40, 40], sitk.sitkUInt8), str(tmp_path / "flat.png"))
    sitk.WriteImage(sitk.Image([4, 40, 40], sitk.sitkVectorUInt8, 3), str(tmp_path / "colour.tif"))
    for name, says in (("slice.dcm", "no volume"), ("flat.png", "no volume"), ("colour.tif", "(colour)")):
        with pytest.raises(MiMError, match=re.escape(says)) as error:
            raw_image._read(tmp_path / name, (str(tmp_path / name),))
        assert str(error.value).count(name) == 1


def test_a_geometry_that_is_none_is_refused(tmp_path, write_ct) -> None:
    content = bytearray(write_ct(name="body.nii").read_bytes())
    content[88:92] = bytes(4)  # pixdim of z
    assert "implausible spacing (3, 2, 0 mm)" in refused(tmp_path / "changed.nii", bytes(content))


@pytest.mark.skipif(sys.platform != "linux", reason="pipes, and names of signals")
def test_a_file_that_crashes_or_would_hang(tmp_path) -> None:
    geometry = "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1\nDimSize = 3 3 3"
    header = f"ObjectType = Image\nNDims = -1\n{geometry}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    assert "its process died of SIG" in refused(tmp_path / "crash.mha", header.encode())
    os.mkfifo(tmp_path / "pipe.nii.gz")
    assert "no regular file" in refused(tmp_path / "pipe.nii.gz")


def test_channels_must_fit(tmp_path, write_ct) -> None:
    paths = [write_ct(name="a_0000.nii.gz"), write_ct(name="a_0001.mha", add=50.0)]
    image = read_image(paths)
    assert image.name == "a"
    np.testing.assert_allclose(image.voxels[1] - image.voxels[0], 50, atol=1e-3)
    with pytest.raises(MiMError, match="channels must fit"):
        read_image([paths[0], write_ct(size=(30, 30, 30), name="b.nrrd")])
    turned = sitk.ReadImage(str(paths[1]))
    turned.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    sitk.WriteImage(turned, str(tmp_path / "turned.mha"))
    with pytest.raises(MiMError, match=r"turned\.mha has another .* or direction than .*a_0000\.nii\.gz"):
        read_image([paths[0], tmp_path / "turned.mha"])


@pytest.mark.parametrize(
    ("name", "case"),
    [("a_0000.nii.gz", "a"), ("a.b.nii", "a.b"), ("X.NRRD", "X"), ("x.mha", "x"), ("slice.dcm", "slice")],
)
def test_names_of_cases(tmp_path, name, case) -> None:
    assert case_name(tmp_path / name) == case
