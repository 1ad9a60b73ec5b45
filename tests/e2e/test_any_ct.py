"""Folders of real CT and two nnU-Net datasets → one pretraining → finetuning on both, with the real commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_mim.preparation.finding import find_volumes
from nnunet_mim.preparation.screening import Header, read_header

pytestmark = pytest.mark.long

UNLABELLED = ("okbp_tr_001", "okbp_va_202", "crlm_1006", "ts_aorta", "lidc_0314", "elastix_lung_baseline")
PREPARE = ("-s", "3", "3", "3", "-np", "2", "--preset", "tiny")
RECIPE = ("--set", "patch_size=64,64,64", "batch_size=1", "num_epochs=1", "iterations_per_epoch=2",
          "val_iterations_per_epoch=1", "mirror_axes=[]")  # fmt: skip


@pytest.fixture(scope="module")
def place(workplace_of, shared_data):
    """Six unlabelled CT, five cases of each labelled dataset."""
    run = workplace_of("any_ct")
    (run.folder / "ct").mkdir()
    for name in UNLABELLED:
        shutil.copy(shared_data / "unlabeled" / f"{name}.nii.gz", run.folder / "ct")
    shutil.copy(shared_data / "single" / "abdomen_label.nii.gz", run.folder / "ct")
    for dataset in ("Dataset501_HeadNeckOAR", "Dataset502_SarcomaGTV"):
        source, raw = shared_data / "nnUNet_raw" / dataset, run.folder / "nnUNet_raw" / dataset
        for part in ("imagesTr", "labelsTr"):
            (raw / part).mkdir(parents=True)
        labels = sorted((source / "labelsTr").glob("*.nii.gz"))[:5]
        for label in labels:
            shutil.copy(label, raw / "labelsTr")
            shutil.copy(source / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz"), raw / "imagesTr")
        content = json.loads((source / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 5}))
    return run


@pytest.fixture(scope="module")
def prepared(place):
    """All three datasets prepared alike."""
    said = place("mim_prepare", "-d", "800", "-n", "Mix", "-i", place.folder / "ct", *PREPARE)
    assert "Dataset800_Mix: 6 cases prepared, 1 left out" in said
    assert "no HU" in said
    said = place("mim_prepare", "-d", "501", "502", *PREPARE, *RECIPE)
    assert "Dataset501_HeadNeckOAR: 5 cases prepared, 0 left out" in said
    return place


def load(run, dataset, case):
    folder = run.folder / "nnUNet_preprocessed" / dataset / "nnUNetMiMPlans_3d_fullres"
    data, *_, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return np.asarray(data[:]), properties


def test_dicom_series_of_real_ct_give_the_voxels_of_the_files(prepared, shared_data, write_series):
    names = UNLABELLED[:4]
    for name in names:
        image = sitk.Cast(sitk.ReadImage(str(shared_data / "unlabeled" / f"{name}.nii.gz")), sitk.sitkInt16)
        write_series(image, prepared.folder / "dicom" / name)
    volumes = find_volumes([prepared.folder / "dicom"])
    assert [volume.name for volume in volumes] == sorted(names)
    assert all(isinstance(read_header(volume, 16), Header) for volume in volumes)
    prepared("mim_prepare", "-d", "801", "-n", "Series", "-i", prepared.folder / "dicom", *PREPARE)
    for name in names:
        expected, place = load(prepared, "Dataset800_Mix", name)
        found, place_there = load(prepared, "Dataset801_Series", name)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert place_there["sitk_stuff"]["origin"] == pytest.approx(place["sitk_stuff"]["origin"], abs=1e-2)


def test_one_pretraining_serves_both_labelled_datasets(prepared):
    said = prepared(
        "mim_pretrain", "-d", "501", "502", "800", "-p", "nnUNetMiMPlans", "--preset", "tiny", "--view", "32",
        "-f", "0",
        "--iterations", "4", "--batch", "2", "--children", "2", "1", "-device", "cpu", "--set", "val_crops=3",
        "--workers", "1",
    )  # fmt: skip
    assert "  Dataset800_Mix: 5 and 1 cases" in said
    results = prepared.folder / "nnUNet_results"
    for dataset in ("Dataset501_HeadNeckOAR", "Dataset502_SarcomaGTV"):
        prepared("nnUNetv2_train", dataset, "3d_fullres", "0", "-tr", "nnUNetTrainerMiM", "-p", "nnUNetMiMPlans",
                 "-device", "cpu")  # fmt: skip
        folder = results / dataset / "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres" / "fold_0"
        log = next(Path(folder).glob("training_log*.txt")).read_text("utf-8")
        assert "Dataset501_HeadNeckOAR/MiMPretrain__nnUNetMiMPlans__3d_fullres/fold_0/checkpoint_final.pth" in log
        summary = json.loads((folder / "validation" / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == 1
