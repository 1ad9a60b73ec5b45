"""What the trainer decides where nobody ran `mim_plan`: as `mim_plan` would."""

import json
import shutil

import pytest
import SimpleITK as sitk

from nnunet_mim.trainers import nnUNetTrainerMiM, nnUNetTrainerMiMScratch
from nnunet_mim.trainers.resolve_plans import resolve_plans


def resolve(plans, dataset_json, trainer=nnUNetTrainerMiM, fold=0, resume=False):
    plans = {**plans, "continue_training": resume}
    return resolve_plans(plans, "3d_fullres", fold, dataset_json, trainer.__name__, trainer.load_pretrained)


def trained(folders, plans, trainer=nnUNetTrainerMiM):
    """What a training leaves in its output folder, as far as another one looks at it."""
    run = folders / "nnUNet_results" / "Dataset007_Toy" / f"{trainer.__name__}__nnUNetPlans__3d_fullres"
    (run / "fold_0").mkdir(parents=True)
    (run / "fold_0" / "checkpoint_latest.pth").touch()
    (run / "plans.json").write_text(json.dumps(plans))


@pytest.fixture
def images(folders):
    """images(orientation): one image in nnUNet_raw; the letters are the directions of the file's axes."""

    def store(orientation):
        folder = folders / "nnUNet_raw" / "Dataset007_Toy" / "imagesTr"
        folder.mkdir(parents=True)
        image = sitk.DICOMOrient(sitk.Image(3, 4, 5, sitk.sitkInt16), orientation)
        sitk.WriteImage(image, folder / "case_0_0000.nii.gz")

    return store


@pytest.mark.parametrize(
    ("orientation", "reader", "axes"),
    [
        ("LPS", "SimpleITKIO", None),
        ("PSL", "SimpleITKIO", ()),
        ("PSL", "NibabelIO", ()),
        ("PSL", "SimpleITKIOWithReorient", None),
    ],
)
def test_left_and_right_are_not_exchanged(images, plans, dataset_json, orientation, reader, axes):
    images(orientation)
    plans["image_reader_writer"] = reader
    resolved = resolve(plans, dataset_json, nnUNetTrainerMiMScratch)
    assert resolved.finetune.mirror_axes == axes
    assert resolved.plans["mim_finetune"]["mirror_axes"] == (axes if axes is None else [])
    assert any("left and right" in note for note in resolved.notes) == (axes == ())


def test_the_user_s_own_axes_stay(images, plans, dataset_json):
    images("PSL")
    plans["mim_finetune"]["mirror_axes"] = [1]
    resolved = resolve(plans, dataset_json, nnUNetTrainerMiMScratch)
    assert resolved.finetune.mirror_axes == (1,)
    assert not any("left and right" in note for note in resolved.notes)


def test_trainings_of_one_experiment_mirror_alike(images, folders, plans, dataset_json, make_checkpoint, monkeypatch):
    """Continued, another fold, and the control, after the raw images are gone."""
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    images("PSL")
    trained(folders, resolve(plans, dataset_json).plans)
    shutil.rmtree(folders / "nnUNet_raw")
    for how in ({"resume": True}, {"fold": 1}, {"trainer": nnUNetTrainerMiMScratch}):
        assert resolve(plans, dataset_json, **how).finetune.mirror_axes == (), how


def test_a_training_that_has_mirrored_goes_on_as_it_began(images, folders, plans, dataset_json, make_checkpoint):
    images("PSL")
    recipe = {**plans["mim_finetune"], "mirror_axes": None}
    trained(folders, {**plans, "mim_finetune": recipe}, nnUNetTrainerMiMScratch)
    assert resolve(plans, dataset_json, nnUNetTrainerMiMScratch, resume=True).finetune.mirror_axes is None


def test_the_control_has_the_network_that_was_trained(folders, plans, dataset_json, make_checkpoint, monkeypatch):
    """Though the checkpoint's would have other strides at this spacing."""
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    before = resolve(plans, dataset_json).plans
    trained(folders, before)
    plans["configurations"]["3d_fullres"] |= {"spacing": [5.0, 0.8, 0.8]}
    control = resolve(plans, dataset_json, nnUNetTrainerMiMScratch)
    architectures = [of["configurations"]["3d_fullres"]["architecture"] for of in (before, control.plans)]
    assert architectures[0] == architectures[1]
    assert any("whose control this is" in note for note in control.notes)


@pytest.mark.parametrize(
    ("spacing", "strides"),
    [
        ([2.5, 2.0, 1.5], [[2, 2, 2]] * 4),  # as in pretraining, 2 mm, within a factor of 1.5
        ([5.0, 0.8, 0.8], [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]),  # tokens of 20 x 13 x 13 mm, not 80 x 13 x 13
    ],
)
def test_the_strides_suit_the_spacing(folders, plans, dataset_json, make_checkpoint, monkeypatch, spacing, strides):
    path, _ = make_checkpoint()
    monkeypatch.setenv("nnUNet_mim_checkpoint", str(path))
    plans["configurations"]["3d_fullres"] |= {"spacing": spacing}
    for trainer in (nnUNetTrainerMiM, nnUNetTrainerMiMScratch):  # the control's network is the same
        resolved = resolve(plans, dataset_json, trainer)
        kwargs = resolved.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert [list(stride) for stride in kwargs["strides"][1:5]] == strides  # the encoder's
        assert any("suit this spacing" in note for note in resolved.notes) == (strides[0] == [1, 2, 2])
