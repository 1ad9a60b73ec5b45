import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.classification import regions
from nnunet_mim.classification.regions import CaseReader, CaseVoxels, cut_regions, resampled_mask
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import find_source


def case_of(shape, mask=None, spacing=(2.0, 1.0, 1.0)):
    """A case whose voxels are all different."""
    voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    return CaseVoxels("case", voxels, mask, spacing, {})


def mask_of(shape, low, high):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


sizes = st.tuples(*[st.integers(1, 40)] * 3)


@given(sizes, st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 3), st.data())
def test_the_windows_cover_the_box_once_or_more_and_nothing_else_counts(shape, window, token, data):
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
    mask = mask_of(shape, low, high)
    case = case_of(shape, mask, (1.0, 1.0, 1.0))
    regions = cut_regions(case, 2.0, window, token)
    box = mask_of(shape, [max(a - 2, 0) for a in low], [min(b + 2, n) for b, n in zip(high, shape, strict=True)])
    seen = [set(region.voxels[0][region.counts].tolist()) for region in regions]
    assert set().union(*seen) == set(case.voxels[0][box].tolist())
    assert set().union(*[region.voxels[0][region.mask].tolist() for region in regions]) == set(
        case.voxels[0][mask].tolist()
    )
    for region in regions:
        assert all(n % t == 0 for n, t in zip(region.voxels.shape[1:], token, strict=True))
        assert all(n <= max(w // t, 1) * t for n, w, t in zip(region.voxels.shape[1:], window, token, strict=True))
        assert region.counts.any()


def test_the_margin_is_in_millimetres():
    mask = mask_of((20, 20, 20), (10, 10, 10), (11, 11, 11))
    low, high = case_of((20, 20, 20), mask).box(4.0)
    np.testing.assert_array_equal(high - low, [5, 9, 9])  # 2 mm slices, 1 mm voxels


def test_a_box_grows_with_what_lies_around_it():
    mask = mask_of((20, 20, 20), (0, 9, 17), (2, 12, 20))
    case = case_of((20, 20, 20), mask)
    (region,) = cut_regions(case, 0.0, (96, 96, 96), (8, 8, 8))
    np.testing.assert_array_equal(region.voxels[0], case.voxels[0, 0:8, 7:15, 12:20])  # shifted to fit into the case
    assert region.counts.sum() == mask.sum()


def test_a_thin_case_is_padded_with_its_outermost_slices():
    case = case_of((2, 16, 16))
    (region,) = cut_regions(case, 0.0, (96, 96, 96), (8, 8, 8))
    assert region.voxels.shape == (1, 8, 16, 16)
    np.testing.assert_array_equal(region.voxels[:, 3:5], case.voxels)
    np.testing.assert_array_equal(region.voxels[:, :3], case.voxels[:, :1].repeat(3, axis=1))
    np.testing.assert_array_equal(region.counts.any(axis=(1, 2)), [False] * 3 + [True] * 2 + [False] * 3)
    np.testing.assert_array_equal(region.mask, region.counts)


def test_the_mask_is_a_further_channel():
    mask = mask_of((8, 8, 8), (1, 2, 3), (4, 5, 6))
    (region,) = cut_regions(case_of((8, 8, 8), mask), 99.0, (8, 8, 8), (8, 8, 8))
    assert region.network_input(mask_channel=False).shape == (1, 8, 8, 8)
    np.testing.assert_array_equal(region.network_input(mask_channel=True)[1], mask)


def test_an_empty_mask_is_none():
    assert case_of((4, 4, 4), np.zeros((4, 4, 4), bool)).mask is None


def test_masks_of_raw_images_are_cropped_and_resampled_as_labels_are(folders, source):
    """nnU-Net has cropped the zeros away, changed the order of axes and the spacing."""
    labels = CaseReader(source, "labels")
    files = CaseReader(source, str(folders.raw / "labelsTr"))
    for case in source.cases[:6]:
        one, other = labels.read(case), files.read(case)
        assert one.mask.any()
        np.testing.assert_array_equal(one.mask, other.mask)
        bright = np.asarray(one.voxels[0])[one.mask].mean() - np.asarray(one.voxels[0])[~one.mask].mean()
        assert bright > 1.5  # more than 375 HU: the mask lies on the ball


def mask_like(folders, path, change):
    """The label of case_00, changed, as a mask; returns its folder."""
    path.mkdir(exist_ok=True)
    label = sitk.ReadImage(str(folders.raw / "labelsTr" / "case_00.nii.gz"))
    sitk.WriteImage(change(label), str(path / "case_00.nii.gz"))
    return str(path)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"])
def test_a_mask_lies_on_its_image_whatever_its_header_says(folders, toy_plans, tmp_path, reader):
    """An image of half a turn, as CT often has it; its mask says so, or says nothing (identity)."""
    toy_plans["image_reader_writer"] = reader
    (folders.base / "nnUNetPlans.json").write_text(json.dumps(toy_plans))
    source = find_source("7", "nnUNetPlans", "3d_fullres")

    def turned(image):
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        return image

    image = turned(sitk.ReadImage(str(folders.raw / "imagesTr" / "case_00_0000.nii.gz")))
    sitk.WriteImage(image, str(tmp_path / "image.nii.gz"))
    manager = PlansManager(toy_plans)
    voxels, _, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(tmp_path / "image.nii.gz")], None, manager, manager.get_configuration("3d_fullres"), {}
    )
    masks = [
        resampled_mask(
            Path(mask_like(folders, tmp_path / name, change), "case_00.nii.gz"), source, voxels.shape[1:], properties
        )
        for name, change in (("turned", turned), ("identity", lambda label: label))
    ]
    bright = np.asarray(voxels[0])[masks[0]].mean() - np.asarray(voxels[0])[~masks[0]].mean()
    assert bright > 1.5, "the mask lies on the ball"
    np.testing.assert_array_equal(masks[1], masks[0])


def test_a_mask_stored_as_decimals_counts_as_whole_numbers(folders, source, tmp_path):
    """Neither are nearly whole numbers lost, nor is what is nearly 0 inside."""
    before = CaseReader(source, str(folders.raw / "labelsTr")).read("case_00").mask
    for factor, more in ((0.999999, 0.0), (1.0, 1e-6)):
        folder = mask_like(folders, tmp_path / "m", lambda m: sitk.Cast(m, sitk.sitkFloat32) * factor + more)  # noqa: B023
        np.testing.assert_array_equal(CaseReader(source, folder).read("case_00").mask, before)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda m: sitk.Cast(m, sitk.sitkFloat32) * 0.5, "0.5"),
        (lambda m: sitk.Cast(m, sitk.sitkUInt16) * 40000, "40000"),
    ],
)
def test_a_mask_of_no_whole_numbers_is_refused(folders, source, tmp_path, change, shown):
    folder = mask_like(folders, tmp_path / "masks", change)
    with pytest.raises(MiMError, match=rf"no whole numbers up to 32767 \({shown}\): .*give the mask of this image"):
        CaseReader(source, folder).read("case_00")


def test_whole_cases_have_no_mask(source):
    assert CaseReader(source).read(source.cases[0]).mask is None


def test_bad_folders_of_masks(folders, source, tmp_path):
    with pytest.raises(MiMError, match="--roi nowhere is no folder"):
        CaseReader(source, "nowhere")
    (tmp_path / "masks").mkdir()
    with pytest.raises(MiMError, match=r"case_00\.nii\.gz is missing: predict this case too"):
        CaseReader(source, str(tmp_path / "masks")).read("case_00")
    wrong = folders.raw / "labelsTr" / "case_01.nii.gz"
    (tmp_path / "masks" / "case_00.nii.gz").write_bytes(wrong.read_bytes())
    with pytest.raises(MiMError, match="give the mask of this image"):
        CaseReader(source, str(tmp_path / "masks")).read("case_00")


def test_a_damaged_case_is_named(folders, source):
    path = source.case_file("case_00")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MiMError, match=r"case_00\.b2nd"):
        CaseReader(source).read("case_00")


def test_a_damaged_mask_ends_the_training_before_it_is_read(folders, source, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for case in ("case_00", "case_01"):
        content = (folders.raw / "labelsTr" / f"{case}.nii.gz").read_bytes()
        (masks / f"{case}.nii.gz").write_bytes(content if case == "case_00" else content[:-20])
    reader = CaseReader(source, str(masks))
    reader.check_masks(["case_00"])
    with pytest.raises(MiMError, match=r"case_01\.nii\.gz \(damaged .*predict this case again"):
        reader.check_masks(["case_00", "case_01"])


def test_a_mask_is_read_under_limits_first(folders, source, monkeypatch):
    monkeypatch.setattr(regions, "READ_SECONDS", 0.0)
    with pytest.raises(MiMError, match=r"case_00\.nii\.gz \(it takes more than 0 s\)"):
        CaseReader(source, str(folders.raw / "labelsTr")).read("case_00")


def test_after_the_worker_nothing_reads_the_file_of_a_mask(folders, source, tmp_path):
    """A training reads masks many times, in processes that nobody watches."""
    masks = tmp_path / "masks"
    shutil.copytree(folders.raw / "labelsTr", masks)
    reader, before = CaseReader(source, str(masks)), CaseReader(source, "labels").read("case_00").mask
    reader.check_masks(["case_00"])
    (masks / "case_00.nii.gz").write_bytes(b"what crashes its reader")
    np.testing.assert_array_equal(reader.read("case_00").mask, before)


def test_a_damaged_case_beside_a_sound_mask_is_named(folders, source):
    path = source.case_file("case_00")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MiMError, match=r"cannot read .*case_00\.b2nd .*preprocess"):
        CaseReader(source, str(folders.raw / "labelsTr")).read("case_00")


@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 2**32 - 1))
def test_masks_are_kept_whole(shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    np.testing.assert_array_equal(regions._Mask.of(mask).array(), mask)
