"""What is missing in nnUNet_raw is named before any work, and what is only away costs nothing."""

import json
import os
import shutil

import pytest
import SimpleITK as sitk

from nnunet_mim.preparation import prepare_case

NAME = "Dataset501_L"


def test_a_missing_channel_is_named_before_anything_else(preparing, ct, here, refused):
    raw = preparing.write_raw(NAME, [[ct(i), sitk.Abs(ct(i))] for i in range(2)])
    (raw / "imagesTr" / "case_1_0001.nii.gz").unlink()
    (raw / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"")
    line = refused("-d", "501")
    assert f"case case_1 of {raw} has 1 images (case_1_0000.nii.gz), {raw}/dataset.json names 2 channels" in line
    assert not (preparing.root / "nnUNet_preprocessed" / NAME).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file_ending": "nii.gz"}, "file_ending"),
        ({"labels": ["a"]}, "labels"),
        ({"channel_names": "CT"}, "channel_names"),
        ({"file_ending": "./../../case"}, "file_ending"),
    ],
)
def test_a_wrong_entry_of_dataset_json_is_named(preparing, ct, refused, change, words):
    raw = preparing.write_raw(NAME, [[ct(0)]])
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | change))
    assert f"{raw}/dataset.json: {words}: " in refused("-d", "501")


@pytest.mark.parametrize("name", ["../../../evil", "a/b", "a\\b", "a\0b", "", "a\nb"])
def test_a_case_whose_name_leads_to_another_folder_is_refused(preparing, ct, refused, name):
    raw = preparing.write_raw(NAME, [[ct(0)]], [preparing.organ_of(ct(0))])
    content = json.loads((raw / "dataset.json").read_text())
    files = {"images": ["imagesTr/case_0_0000.nii.gz"], "label": "labelsTr/case_0.nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**content, "dataset": {name: files}}))
    before = set(preparing.root.rglob("*"))
    assert f"{raw}/dataset.json: dataset." in refused("-d", "501")
    assert {path for path in preparing.root.rglob("*") if path.suffix != ".lock"} == before


def test_a_dataset_of_the_first_version_names_the_command_that_converts_it(preparing, ct, refused):
    raw = preparing.write_raw(NAME, [[ct(0)]])
    old = {"modality": {"0": "CT"}, "labels": {"0": "background"}, "training": [], "numTraining": 0}
    (raw / "dataset.json").write_text(json.dumps(old))
    assert "nnUNetv2_convert_old_nnUNet_dataset" in refused("-d", "501")


@pytest.mark.parametrize("entry", ["labels", "numTraining", "file_ending", "channel_names"])
def test_an_entry_of_dataset_json_that_is_missing(preparing, ct, refused, entry):
    raw = preparing.write_raw(NAME, [[ct(0)]])
    content = json.loads((raw / "dataset.json").read_text())
    del content[entry]
    (raw / "dataset.json").write_text(json.dumps(content))
    assert f"{raw}/dataset.json has no {entry}: see nnU-Net's page" in refused("-d", "501")


def test_another_number_of_cases_than_there_are_is_refused_and_the_remedy_helps(preparing, ct, refused):
    raw = preparing.write_raw(NAME, [[ct(i)] for i in range(3)])
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 7}))
    line = refused("-d", "501")
    assert f"{raw}/dataset.json states 7 cases, 3 are there: write numTraining 3, or bring back the rest" in line
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": 3}))
    assert preparing(501) == 0


@pytest.fixture
def disk(preparing, ct, without_fingerprint):
    """Dataset 501, prepared, whose images and labels lie on a disk of their own; returns the disk's folder."""
    disk = preparing.write_raw(
        "Dataset999_Disk", [[ct(i)] for i in range(3)], [preparing.organ_of(ct(i)) for i in range(3)]
    )
    raw = preparing.root / "nnUNet_raw" / NAME
    raw.mkdir()
    content = json.loads((disk / "dataset.json").read_text())
    content["dataset"] = {
        f"case_{i}": {
            "images": [str(disk / "imagesTr" / f"case_{i}_0000.nii.gz")],
            "label": str(disk / "labelsTr" / f"case_{i}.nii.gz"),
        }
        for i in range(3)
    }  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content))
    assert preparing(501) == 0
    return disk


def stamps(folder):
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_images_on_a_disk_that_is_partly_away_are_kept(preparing, disk, capsys):
    before = stamps(preparing.folder(NAME))
    aside = disk.with_name("aside")
    aside.mkdir()
    for path in [*disk.glob("*/case_1*")]:
        shutil.move(path, aside / path.name)
    capsys.readouterr()
    assert preparing(501) == 0
    said = capsys.readouterr().out
    assert "3 cases prepared, 1 of them doubtful, 0 left out" in said
    assert "cannot be read (" in said
    assert "case_1_0000.nii.gz is not there): kept as it was prepared" in said
    assert stamps(preparing.folder(NAME)) == before
    assert preparing(501, "--strict") == 2
    assert "--strict: 1 left out or unreadable, the first is " in capsys.readouterr().err
    shutil.move(aside / "case_1_0000.nii.gz", disk / "imagesTr")
    shutil.move(aside / "case_1.nii.gz", disk / "labelsTr")
    assert preparing(501, "--strict") == 0
    assert "doubtful" not in capsys.readouterr().out
    assert stamps(preparing.folder(NAME)) == before


def test_a_disk_that_is_away_ends_in_one_line(preparing, disk, refused):
    before = stamps(preparing.folder(NAME))
    disk.rename(disk.with_name("elsewhere"))
    line = refused("-d", "501", "-s", "4")
    assert "none of 3 images can be used (case_0: cannot be read (" in line
    assert "bring them back and repeat the command; 3 cases of Dataset501_L are prepared and are kept" in line
    assert "none of 3 images can be used" in refused("-d", "501", "-s", "5", "--overwrite")
    assert stamps(preparing.folder(NAME)) == before


def test_overwrite_deletes_nothing_that_cannot_be_made_anew(preparing, disk, refused):
    before = stamps(preparing.folder(NAME))
    (disk / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"")
    line = refused("-d", "501", "-s", "5", "--overwrite")
    assert "--overwrite would delete 1 prepared cases that cannot be prepared anew, such as case_2" in line
    assert stamps(preparing.folder(NAME)) == before


def test_labels_that_are_away_do_not_make_a_dataset_without_labels(preparing, disk, refused):
    shutil.rmtree(disk / "labelsTr")
    references = preparing.root / "nnUNet_preprocessed" / NAME / "gt_segmentations"
    line = refused("-d", "501", "-s", "4")
    assert f"and so are all labels that {NAME} was prepared with: bring them back, or delete {references}" in line
    shutil.rmtree(references)
    assert preparing(501) == 0


def test_a_hiccup_of_the_storage_takes_nothing_away(preparing, images, here, monkeypatch, capsys):
    """The file can be seen and has changed, but its voxels cannot be read any more."""
    assert preparing.new(images) == 0
    before = stamps(preparing.folder())
    os.utime(images / "scan1.nii.gz", (1, 1))

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_case, "damaged", fail)
        assert preparing.new(images) == 0
    assert "scan1.nii.gz: cannot be read or prepared ([Errno 5] Input/output error): kept" in capsys.readouterr().out
    assert stamps(preparing.folder()) == before
    (images / "scan1.nii.gz").write_bytes((images / "scan1.nii.gz").read_bytes()[:3000])
    assert preparing.new(images) == 0
    assert "damaged (" in capsys.readouterr().out
    assert stamps(preparing.folder()) == before


def test_a_name_that_nnunet_takes_for_a_segmentation(preparing, ct, here):
    """case_0_seg.b2nd would be the segmentation of case_0, and no case. (mim_prepare -i gives them other names.)"""
    raw = preparing.write_raw(NAME, [[ct(0)], [ct(1)]])
    for path in raw.glob("imagesTr/case_1*"):
        path.rename(path.with_name("case_0_seg_0000.nii.gz"))
    assert preparing(501) == 0
    assert list(preparing.log(NAME).prepared) == ["case_0"]
    reason = preparing.log(NAME).skipped["case_0_seg"]["reason"]
    assert reason == "its name ends in _seg (nnU-Net takes such files for segmentations): rename the image"


def test_slices_are_counted_once_more_when_they_have_been_resampled(preparing, images, here, capsys):
    """28 rows of 3 mm are 14 of 6 mm."""
    assert preparing.new(images) == 0
    command = ("-n", "Coarse", "-i", images)
    assert preparing(801, *command, spacing="6") == 2
    reason = "fewer than 16 slices once resampled (16 x 14 x 16 of 6 x 6 x 6 mm, z y x)"
    assert f"no case of Dataset801_Coarse could be prepared (scan0: {reason}" in capsys.readouterr().err
    assert preparing(801, *command, "--min_slices", "14", spacing="6") == 0
    assert len(preparing.log("Dataset801_Coarse").prepared) == 3
    assert preparing(801, *command, spacing="6") == 2, "the limit counts for what is prepared, too"


def test_channels_that_do_not_fit_each_other_are_named(preparing, ct, here):
    turned = sitk.Image(ct(5))
    turned.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    images = [[ct(0), ct(1)], [ct(2), ct(3, shape=(24, 28, 30))], [ct(4), turned]]
    preparing.write_raw(NAME, images)
    assert preparing(501) == 0
    log = preparing.log(NAME)
    assert log.skipped["case_1"]["reason"] == (
        "channels do not fit each other (case_1_0001.nii.gz has 30 x 28 x 24 voxels, the first channel 32 x 28 x 24 "
        "(x, y, z))"
    )
    assert log.prepared["case_0"]["warnings"] == []
    (warning,) = log.prepared["case_2"]["warnings"]
    assert warning.startswith("channels lie differently (case_2_0001.nii.gz has another direction than the first ")


@pytest.mark.parametrize(
    "line",
    ['{"case": "case_0"}', '{"case": "case_0", "reason": 3}', '{"case": "case_0", "key": "", "files": []}',
     '{"case": "../../x", "reason": "no", "key": "", "files": ["a"], "images": ["a"]}', "[1]", "3", "null"],
)  # fmt: skip
def test_a_line_of_the_log_that_was_changed_does_not_count(preparing, ct, here, line):
    preparing.write_raw(NAME, [[ct(0)], [ct(1)]])
    assert preparing(501) == 0
    log = preparing.log(NAME)
    with log.path.open("a") as file:
        file.write(f"{line}\n")
    assert preparing.log(NAME).entries == log.entries
    assert preparing(501) == 0
