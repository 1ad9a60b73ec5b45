"""What the trainer decides where nobody ran `mim_plan`: as `mim_plan` would."""

import pytest
import SimpleITK as sitk

from nnunet_mim.trainers import nnUNetTrainerMiM, nnUNetTrainerMiMScratch
from nnunet_mim.trainers.resolve_plans import resolve_plans


def resolve(plans, dataset_json, trainer=nnUNetTrainerMiM, resume=False):
    plans = {**plans, "continue_training": resume}
    return resolve_plans(plans, "3d_fullres", 0, dataset_json, trainer.__name__, trainer.load_pretrained)


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
