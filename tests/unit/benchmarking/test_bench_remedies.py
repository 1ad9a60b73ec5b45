"""What `mim_benchmark run FILE` advises are entries of its file: it has no -p, -c and -f."""

import json

import pytest

from nnunet_mim.benchmarking.bench_file import ArmSpec
from nnunet_mim.benchmarking.cell import resolve_arm
from nnunet_mim.checkpoint.locate import no_checkpoint_error
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.source import Source
from nnunet_mim.nnunet.splits import split_of

DATASET = "Dataset007_Toy"


@pytest.mark.parametrize(
    ("name", "configuration", "says"),
    [
        ("TYPO", "3d_fullres", r"no plans 'TYPO' .*choose one with the arm's plans \(nnUNetPlans\)"),
        ("nnUNetPlans", "typo", r"'typo': choose one with the dataset's configuration \(2d, 3d_fullres\)"),
    ],
)
def test_plans_and_configurations(tmp_path, monkeypatch, plans, name, configuration, says):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    folder = tmp_path / "nnUNet_preprocessed" / DATASET
    folder.mkdir()
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(MiMError, match=says):
        resolve_arm(ArmSpec("Stock", "nnUNetTrainer", name), "7", configuration, 0)


def test_folds(tmp_path):
    folder = tmp_path / DATASET / "P_3d_fullres"
    (folder.parent / "gt_segmentations").mkdir(parents=True)
    cases = tuple(f"case_{i}" for i in range(6))
    source = Source(DATASET, "P", "3d_fullres", folder, None, cases, (1, 1, 1), ("CTNormalization",), {}, {})
    with pytest.raises(MiMError, match="choose another with the dataset's folds"):
        split_of(source, 5, "the dataset's folds")


def test_a_missing_checkpoint(tmp_path):
    plans = {"dataset_name": DATASET, "plans_name": "P"}
    said = str(no_checkpoint_error(plans, "3d_fullres", 0, tmp_path, "give the arm a checkpoint"))
    assert said.endswith("run `mim_pretrain -d 007 -p P -c 3d_fullres -f 0`, or give the arm a checkpoint")
    assert "-tr nnUNetTrainerMiMScratch" in str(no_checkpoint_error(plans, "3d_fullres", 0, tmp_path))
