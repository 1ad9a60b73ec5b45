"""The plans that `mim_plan` lets nnU-Net write first, against those of nnU-Net's own functions."""

import json
import os
from pathlib import Path

import pytest
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import raw_files
from nnunet_mim.preparation.common_plans import write_nnunet_plans

DATASET = "Dataset021_Raw"


@pytest.fixture
def raw(preparing, ct, monkeypatch):
    """A labelled dataset of two images in nnUNet_raw, with splits beside them."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    images = [ct(seed) for seed in range(2)]
    folder = preparing.write_raw(
        DATASET, [[image] for image in images], [preparing.organ_of(image) for image in images]
    )
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_1"]}]))
    return folder


@pytest.mark.long
def test_plans_are_those_of_nnunet(raw, nnunet_folders):
    preprocessed = nnunet_folders / "nnUNet_preprocessed"
    extract_fingerprint_dataset(21, num_processes=1, check_dataset_integrity=True, show_progress_bar=False)
    plan_experiment_dataset(21)
    (preprocessed / DATASET).rename(preprocessed / "by_nnunet")
    assert not (preprocessed / DATASET).exists()

    write_nnunet_plans(DATASET, 1)
    expected, written = (
        {path.name: path.read_bytes() for path in (preprocessed / name).iterdir()} for name in ("by_nnunet", DATASET)
    )
    assert set(written) == {"dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json", "splits_final.json"}
    assert written == expected


def test_labels_that_are_missing_are_named_and_nothing_is_written(raw, nnunet_folders):
    (raw / "labelsTr" / "case_1.nii.gz").unlink()
    with pytest.raises(MiMError, match=r"cannot plan Dataset021_Raw .*case_1\.nii\.gz.*--verify_dataset_integrity"):
        write_nnunet_plans(DATASET, 1)
    assert not (nnunet_folders / "nnUNet_preprocessed" / DATASET).exists()


def write_fingerprint(number, **_):
    folder = Path(os.environ["nnUNet_preprocessed"], DATASET)
    (folder / "dataset_fingerprint.json").write_text(json.dumps({"spacings": [[4.0, 3.0, 3.0]]}))


def test_other_splits_than_those_of_before_are_refused(raw, nnunet_folders, monkeypatch):
    """nnU-Net refuses it too: trainings of both would be told apart by nothing."""
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / DATASET
    preprocessed.mkdir()
    splits = preprocessed / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["case_1"], "val": ["case_0"]}]))
    before = splits.read_bytes()
    monkeypatch.setattr("nnunet_mim.preparation.common_plans.extract_fingerprint_dataset", write_fingerprint)
    with pytest.raises(MiMError, match="cannot plan Dataset021_Raw"):
        write_nnunet_plans(DATASET, 1)
    assert [path.name for path in preprocessed.iterdir()] == [splits.name]
    assert splits.read_bytes() == before


def test_no_process_is_forked_to_find_the_files(raw, nnunet_folders, monkeypatch):
    """The child of a process with threads can wait for ever; nnU-Net forks where dataset.json lists no files."""
    monkeypatch.setattr("nnunet_mim.preparation.common_plans.extract_fingerprint_dataset", write_fingerprint)
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", None)
    found = []
    monkeypatch.setattr(
        "nnunet_mim.preparation.common_plans.plan_experiment_dataset",
        lambda number: found.append(
            get_filenames_of_train_images_and_targets(os.environ["nnUNet_raw"] + f"/{DATASET}")
        ),
    )
    write_nnunet_plans(DATASET, 1)
    assert found == [raw_files(raw, json.loads((raw / "dataset.json").read_text()))]
    assert len(found[0]) == 2
