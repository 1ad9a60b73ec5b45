"""Where a checkpoint is looked for."""

import os

import pytest

from nnunet_mim.checkpoint.locate import find_checkpoint, no_checkpoint_error, write_pointers
from nnunet_mim.errors import MiMError


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("nnUNet_mim_checkpoint", raising=False)


def run_file(tmp_path, fold, tag="", name="checkpoint_final.pth"):
    path = tmp_path / "Dataset007_Toy" / f"MiMPretrain{tag}__nnUNetPlans__3d_fullres" / f"fold_{fold}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_order_variable_then_plans_then_run(tmp_path, plans, monkeypatch):
    run = run_file(tmp_path, 0)
    (tmp_path / "a.pth").touch()
    (tmp_path / "b.pth").touch()
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == run
    plans["pretrain_info"] = {"checkpoint_path": str(tmp_path / "a.pth")}
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == tmp_path / "a.pth"
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(tmp_path / "b.pth"))
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == tmp_path / "b.pth"


def test_own_fold_before_all_and_never_another(tmp_path, plans):
    run_file(tmp_path, 1)
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) is None
    everything = run_file(tmp_path, "all")
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == everything
    own = run_file(tmp_path, 0)
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == own
    assert find_checkpoint(plans, "3d_fullres", "all", tmp_path) == everything


def test_unfinished_runs_and_other_plans_do_not_count(tmp_path, plans):
    unfinished = run_file(tmp_path, 0, name="checkpoint_latest.pth")
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) is None
    assert str(unfinished) in str(no_checkpoint_error(plans, "3d_fullres", 0, tmp_path))
    run_file(tmp_path, 0)
    assert find_checkpoint({**plans, "plans_name": "other"}, "3d_fullres", 0, tmp_path) is None
    assert find_checkpoint(plans, "3d_lowres", 0, tmp_path) is None


def test_of_a_run_of_its_own_and_one_of_several_datasets_the_newer_counts(tmp_path, plans):
    own, joint = run_file(tmp_path, 0), tmp_path / "Dataset008_Other" / "run" / "fold_0" / "checkpoint_final.pth"
    joint.parent.mkdir(parents=True)
    joint.touch()
    write_pointers([own.parent], joint)
    for times, newer in (((1e9, 2e9), joint), ((3e9, 2e9), own)):
        for path, time in zip((own, joint), times, strict=True):
            os.utime(path, (time, time))
        assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == newer
    joint.unlink()
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == own


def test_tagged_runs(tmp_path, plans):
    tagged = run_file(tmp_path, 0, tag="_long")
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == tagged
    run_file(tmp_path, 0, tag="_short")
    with pytest.raises(MiMError, match="several pretraining runs"):
        find_checkpoint(plans, "3d_fullres", 0, tmp_path)
    untagged = run_file(tmp_path, 0)
    assert find_checkpoint(plans, "3d_fullres", 0, tmp_path) == untagged


def test_a_named_file_that_is_missing_is_an_error_not_the_next_source(tmp_path, plans, monkeypatch):
    run_file(tmp_path, 0)
    plans["pretrain_info"] = {"checkpoint_path": "/nowhere/a.pth"}
    with pytest.raises(MiMError, match=r"^pretrain_info in the plans file: .*/nowhere/a\.pth does not exist"):
        find_checkpoint(plans, "3d_fullres", 0, tmp_path)
    monkeypatch.setenv("nnUNet_mim_checkpoint", "/nowhere/b.pth")
    with pytest.raises(MiMError, match=r"^environment variable nnUNet_mim_checkpoint: .*b\.pth does not exist"):
        find_checkpoint(plans, "3d_fullres", 0, tmp_path)


def test_the_error_says_what_to_run(plans, tmp_path):
    message = str(no_checkpoint_error(plans, "3d_fullres", 2, tmp_path))
    assert "mim_pretrain -d 007 -p nnUNetPlans -c 3d_fullres -f 2" in message
    assert "nnUNetTrainerMiMScratch" in message
    assert "\n" not in message
