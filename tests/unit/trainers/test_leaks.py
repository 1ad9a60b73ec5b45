"""nnUNetTrainerMiM names validation cases that the encoder was pretrained on."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import zoom

from nnunet_mim.checkpoint.fingerprint import fingerprint, to_text
from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.identity import voxel_sha256
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.errors import MiMError
from nnunet_mim.trainers import nnUNetTrainerMiM

CPU = torch.device("cpu")


def start(plans, dataset_json, fold=0):
    """A trainer as nnUNetv2_train makes it."""
    return nnUNetTrainerMiM({**deepcopy(plans), "continue_training": False}, "3d_fullres", fold, dataset_json, CPU)


def log_text(trainer):
    return Path(trainer.log_file).read_text()


@pytest.mark.parametrize("known_by", ["name", "voxels"])
def test_pretrained_validation_cases_are_announced(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch, voxels, known_by
):
    dataset = "Dataset007_Toy" if known_by == "name" else "Dataset800_Pool"
    cases = [
        {"dataset": dataset, "case": case if known_by == "name" else f"other_{i}", "sha256": voxel_sha256(image)}
        for i, (case, image) in enumerate(voxels.items())
    ]
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint(cases=cases)[0]))
    trainer = start(mim_plans, dataset_json)
    trainer.on_train_start()
    assert "WARNING: 1 of 1 validation cases of this fold were PRETRAINED ON" in log_text(trainer)
    record = json.loads(Path(trainer.output_folder, "mim_transfer.json").read_text())
    assert len(record["leaked_cases"]) == 1
    assert record["pretraining"]["iterations"] == 10


def changed_copies(voxels):
    """Name → a copy (1, X, Y, Z) of a preprocessed body that its hash does not find."""
    one = voxels.copy()
    one[0, 20, 20, 20] += 1 / 250
    return {
        **{f"mirrored along {axis}": np.flip(voxels, axis) for axis in (1, 2, 3)},
        "one voxel by 1 HU": one,
        "crop": voxels[:, :-1, 1:],
        "one slice less": voxels[:, :-1],
        "padding": np.pad(voxels, ((0, 0), (5, 0), (0, 3), (2, 2)), constant_values=-4),
        "resampling": zoom(voxels, (1, 1.5, 1.5, 1.5), order=1, grid_mode=True, mode="nearest"),
        "header spacing": zoom(voxels, (1, 1.3, 1, 1), order=1, grid_mode=True, mode="nearest"),
        "noise of 1 HU": voxels + np.random.default_rng(0).normal(0, 1 / 250, voxels.shape),
        "rounding": voxels.astype(np.float16),
        "HU offset": voxels + 10 / 250,
        "axes transposed": voxels.transpose(0, 3, 1, 2),
        "another orientation code": np.flip(voxels.transpose(0, 3, 1, 2), (1, 2)),
    }


def test_changed_copies_of_validation_cases_are_announced(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    """The stock plans' window and spacing are not those of the pretraining."""
    stock = {"percentile_00_5": -103.0, "percentile_99_5": 164.0, "mean": 30.0, "std": 60.0}
    mim_plans["foreground_intensity_properties_per_channel"]["0"].update(stock)
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    trainer = start(mim_plans, dataset_json)
    _, (case,) = trainer.do_split()
    hounsfield = make_phantom(0, (40, 36, 34))[0][None].astype(np.float32)
    data = (hounsfield.clip(-103, 164) - 30) / 60
    properties = {"class_locations": {1: np.zeros((0, 4), int)}, "spacing": [2.0, 2.0, 2.0]}
    file = Path(trainer.preprocessed_dataset_folder, case)
    for old in file.parent.glob(f"{case}*"):
        old.unlink()
    nnUNetDatasetBlosc2.save_case(data, np.zeros_like(data, np.int8), properties, str(file))
    trainer.on_train_start()
    report = Path(trainer.output_folder, "mim_transfer.json")
    checkpoint = PretrainedCheckpoint.load(make_checkpoint()[0])
    missed = []
    for name, copy in changed_copies(hounsfield.clip(-1000, 1000) / 250).items():
        rows = fingerprint(copy, Units.of(checkpoint.provenance), [2.0, 2.0, 2.0])
        record = {"dataset": "Dataset800_Pool", "case": "x", "sha256": "1" * 64, "fingerprint": to_text(rows)}
        trainer._checkpoint = replace(checkpoint, provenance={**checkpoint.provenance, "cases": [record]})
        trainer._check_provenance()
        if json.loads(report.read_text())["probably_leaked_cases"] != {case: "Dataset800_Pool x"}:
            missed.append(name)
    assert missed == []
    assert f"{case} is probably the same as Dataset800_Pool x" in log_text(trainer)


def test_a_checkpoint_without_fingerprints_is_said_to_find_exact_copies_only(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch
):
    cases = [{"dataset": "Dataset800_Pool", "case": "x", "sha256": "1" * 64}]
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint(cases=cases)[0]))
    trainer = start(mim_plans, dataset_json)
    trainer.on_train_start()
    assert "so only exact copies were looked for" in log_text(trainer)
    assert "WARNING" not in log_text(trainer)


def test_no_warning_when_the_fold_was_left_out(folders, mim_plans, dataset_json, make_checkpoint, monkeypatch, voxels):
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    trainer = start(mim_plans, dataset_json)
    _, (held_out,) = trainer.do_split()
    cases = [
        {"dataset": "Dataset007_Toy", "case": case, "sha256": voxel_sha256(image)}
        for case, image in voxels.items()
        if case != held_out
    ]
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint(cases=cases)[0]))
    trainer = start(mim_plans, dataset_json)
    trainer.on_train_start()
    assert "WARNING" not in log_text(trainer)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"leaked_cases": 5}, "leaked_cases"), ({"n_val_cases": "a"}, "n_val_cases"), ({"source": None}, "source"),
     ({"probably_leaked_cases": ["a"]}, "probably_leaked_cases"), ([], "the content")],
)  # fmt: skip
def test_a_record_of_a_transfer_that_was_changed_is_named(
    folders, mim_plans, dataset_json, make_checkpoint, monkeypatch, change, field
):
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: None)
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(make_checkpoint()[0]))
    trainer = start(mim_plans, dataset_json)
    record = Path(trainer.output_folder, "mim_transfer.json")
    whole = {"source": "a.pth", "leaked_cases": ["x"], "probably_leaked_cases": {}, "n_val_cases": 2}
    record.write_text(json.dumps(whole))
    trainer.perform_actual_validation()
    assert "1 of 2 validation cases" in log_text(trainer)
    record.write_text(json.dumps({**whole, **change} if change else change))
    with pytest.raises(MiMError, match=rf"mim_transfer\.json: {field}: .*delete it"):
        trainer.perform_actual_validation()
