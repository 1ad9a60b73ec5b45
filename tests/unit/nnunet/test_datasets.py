"""Files of datasets in nnUNet_raw. That they are those nnU-Net finds: preparation/test_prepare_trouble.py."""

import json

import nnunetv2.utilities.utils
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.datasets import raw_files, raw_images
from nnunet_mim.nnunet.orientation import mirroring_is_unsafe

DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A dataset of two cases in nnUNet_raw."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / "Dataset904_R"
    (folder / "imagesTr").mkdir(parents=True)
    for case in ("a", "b"):
        sitk.WriteImage(sitk.Image(3, 4, 5, sitk.sitkInt16), folder / "imagesTr" / f"{case}_0000.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return folder


def no_pool(*_, **__):
    raise AssertionError("a pool of processes")


def test_nothing_forks(raw, monkeypatch):
    """A forked child of a process with threads can wait for ever."""
    monkeypatch.setattr(nnunetv2.utilities.utils, "Pool", no_pool)
    images = raw / "imagesTr"
    expected = {case: [str(images / f"{case}_0000.nii.gz")] for case in ("a", "b")}
    assert raw_images(raw.name) == expected
    assert {case: entry["images"] for case, entry in raw_files(raw, DATASET_JSON).items()} == expected
    assert not mirroring_is_unsafe(raw, DATASET_JSON)


def test_listed_files_are_found_and_the_list_is_not_changed(raw, monkeypatch):
    monkeypatch.setattr(nnunetv2.utilities.utils, "Pool", no_pool)
    listed = {"c": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}
    content = {**DATASET_JSON, "dataset": json.loads(json.dumps(listed))}
    (raw / "dataset.json").write_text(json.dumps(content))
    assert raw_images(raw.name) == {"c": [str(raw / "imagesTr" / "a_0000.nii.gz")]}
    assert not mirroring_is_unsafe(raw, content)
    assert content["dataset"] == listed


def test_what_is_not_there_is_empty(raw):
    assert raw_images("Dataset905_Gone") == {}
    for path in (raw / "imagesTr").iterdir():
        path.unlink()
    (raw / "imagesTr").rmdir()
    assert raw_images(raw.name) == {}
