"""The pictures and the table of the organs that were found, from bodies and predictions on disk."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.demo.phantoms import write_phantom_dataset
from nnunet_mim.demo.report import ORGANS, TRANSFERRED, _dice_of_organs, _organs_section
from nnunet_mim.demo.stages import DATASET_ID, QUICK, Folders
from nnunet_mim.trainers.transfer import TransferReport


@pytest.fixture
def folders(tmp_path):
    """Two unseen bodies: the first is predicted without fault, of the second nothing is found."""
    folders = Folders(tmp_path)
    write_phantom_dataset(folders.raw.parent, DATASET_ID, "Phantoms", 0, 2, 0, (24,) * 3, (12.0,) * 3)
    shutil.copytree(folders.labels, folders.predictions)
    second = folders.predictions / "case_0001.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(second)) * 0, str(second))
    folders.finetuning.mkdir(parents=True)
    transferred = {"loaded": ["a"], "adapted": {}, "fresh": ["b", "c"]}
    (folders.finetuning / "mim_transfer.json").write_text(json.dumps(transferred))
    return folders


def test_organs_that_are_found_and_that_are_not(folders):
    bodies = ["case_0000.nii.gz", "case_0001.nii.gz"]
    dices = np.array([_dice_of_organs(folders, body) for body in bodies])
    assert dices.tolist() == [[1.0] * len(ORGANS), [0.0] * len(ORGANS)]
    section = _organs_section(folders, QUICK, bodies, dices)
    assert section.table[1] == ["liver", "1.00", "0.00", "0.50"]
    assert section.table[-1] == ["all organs", "1.00", "0.00", "0.50"]
    (figure,) = section.figures
    assert "unseen body: case_0000, Dice nnUNetTrainerMiM 100.0 %" in figure.get_label()
    found, missed = figure.axes
    assert found.yaxis_inverted(), "y grows to the back: the chest is up"
    assert len(found.collections) == 2 * len(ORGANS), "contours of the reference and of what was found"
    assert 4 <= len(missed.collections) <= len(ORGANS), "of the reference alone"
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["liver", "spleen"]


def test_the_page_takes_what_a_trainer_writes() -> None:
    """mim_transfer.json holds the fields of a TransferReport, names and what was done to adapted ones."""
    made = TransferReport("tiny-ct", loaded=["a"], adapted={"b": "cut"}, fresh=["c"], unfit={"c": "size"})
    written = json.loads(json.dumps({name: getattr(made, name) for name in ("loaded", "adapted", "fresh")}))
    assert TRANSFERRED.validate_python(written) == written
