"""`mim_prepare -i` on small made-up CT, with nnU-Net's own code inside."""

import csv
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.identity import merged_records, voxel_sha256
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.preparation import prepare, prepare_case
from nnunet_mim.preparation.prepare_cli import main
from nnunet_mim.pretraining.data import case_index
from nnunet_mim.pretraining.data.case_index import read_index
from nnunet_mim.pretraining.data.crops import Cases

NAME = "Dataset800_Mine"


def test_a_folder_becomes_a_dataset_that_nnunet_reads(preparing, images, here, capsys):
    assert preparing.new(images) == 0
    said = capsys.readouterr().out
    assert f"{NAME}: 3 cases prepared, 0 left out" in said
    assert "next: mim_pretrain -d 800 -p nnUNetMiMPlans\n" in said
    folder = preparing.folder()
    dataset = infer_dataset_class(str(folder))(str(folder))
    assert dataset.identifiers == ["scan0", "scan1", "scan2"]
    plans_file = folder.parent / "nnUNetMiMPlans.json"
    manager = PlansManager(str(plans_file))
    content = json.loads((folder.parent / "dataset.json").read_text())
    labels = manager.get_label_manager(content)
    loader = nnUNetDataLoader(dataset, 2, (16, 16, 16), (16, 16, 16), labels)
    batch = next(loader)
    assert batch["data"].shape == (2, 1, 16, 16, 16)
    assert -4.5 < float(batch["data"].min()) < float(batch["data"].max()) < 4.5
    assert content == json.loads((preparing.root / "nnUNet_raw" / NAME / "dataset.json").read_text())
    assert content["dataset"]["scan1"]["images"] == [str(images / "scan1.nii.gz")]
    assert not list((preparing.root / "nnUNet_raw" / NAME / "imagesTr").iterdir()), "nothing was copied"
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "dataset.json", "dataset_fingerprint.json", "mim_case_index", "mim_prepare", "nnUNetMiMPlans.json",
        "nnUNetMiMPlans_3d_fullres",
    ]  # fmt: skip
    page = (folder.parent / "mim_prepare" / "nnUNetMiMPlans_3d_fullres.html").read_text("utf-8")
    assert "3 cases are ready for pretraining, no image was left out." in page
    assert page.count("<img ") == 2


def test_voxels_are_those_of_stock_nnunet(preparing, images, here):
    preparing.new(images)
    plans = PlansManager(str(preparing.folder().parent / "nnUNetMiMPlans.json"))
    for i in range(3):
        expected, seg, properties = DefaultPreprocessor(verbose=False).run_case(
            [str(images / f"scan{i}.nii.gz")], None, plans, plans.get_configuration("3d_fullres"), {}
        )
        found, found_seg, found_properties = preparing.voxels(f"scan{i}")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.array_equal(found_seg, seg)
        assert found_properties.pop("class_locations") == {}
        assert str(found_properties) == str(properties)


def test_dicom_and_turned_files_give_the_same_voxels(preparing, tmp_path, ct, dicom, here):
    """A DICOM series, the file it was written from, and the same in other orientations are one image."""
    for name in ("file", "series", "turned"):
        (tmp_path / name).mkdir()
    image = ct(5)
    sitk.WriteImage(image, str(tmp_path / "file" / "a.nii.gz"))
    dicom(image, tmp_path / "series" / "a")
    sitk.WriteImage(sitk.DICOMOrient(image, "PIR"), str(tmp_path / "turned" / "a.nrrd"))
    for number, name in enumerate(("file", "series", "turned")):
        assert preparing(801 + number, "-n", "X", "-i", tmp_path / name) == 0
    first, _, properties = preparing.voxels("a", "Dataset801_X")
    assert first.shape == (1, 24, 21, 24)
    for number in (802, 803):
        other, _, other_properties = preparing.voxels("a", f"Dataset{number}_X")
        np.testing.assert_allclose(other, first, atol=1e-5)
        for key in ("origin", "direction"):
            assert other_properties["sitk_stuff"][key] == pytest.approx(properties["sitk_stuff"][key], abs=1e-4)
    (copied,) = (preparing.root / "nnUNet_raw" / "Dataset802_X" / "imagesTr").iterdir()
    assert copied.name == "a_0000.nii.gz"
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(copied))), sitk.GetArrayFromImage(image))


def test_what_is_no_ct_is_left_out_with_its_reason(preparing, images, ct, dicom, here, capsys):
    hu = sitk.GetArrayFromImage(ct(0))

    def write(array, name):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(images / name))

    write((hu > 0).astype(np.uint8), "label.nii.gz")
    write(hu[:8], "thin.nii.gz")
    write(hu[3], "flat.nrrd")
    write(np.where(hu > 20, np.nan, hu).astype(np.float32), "nan.nii")
    shutil.copy(images / "scan1.nii.gz", images / "twin.nii.gz")
    (images / "broken.nii.gz").write_bytes((images / "scan0.nii.gz").read_bytes()[:5000])
    dicom(ct(7), images / "mr", modality="MR", uid="1.7")
    dicom(ct(7), images / "scout", uid="1.8", **{"0008|0008": "DERIVED\\LOCALIZER"})
    assert preparing.new(images) == 0
    said = capsys.readouterr().out
    assert "3 cases prepared, 8 left out" in said
    table = preparing.log().path.with_name("nnUNetMiMPlans_3d_fullres_skipped.csv")
    with table.open(encoding="utf-8") as file:
        reasons = {row["case"]: row["reason"] for row in csv.DictReader(file)}
    starts = {
        "label": "no HU (values 0 to 1",
        "thin": "fewer than 16 slices",
        "flat": "2-D",
        "nan": "holds NaN",
        "twin": "a duplicate (the same image as scan1)",
        "broken": "damaged",
        "mr": "not a CT (modality MR)",
        "scout": "a localiser",
    }
    assert reasons.keys() == starts.keys()
    for case, start in starts.items():
        assert reasons[case].startswith(start)
    assert "1 fewer than 16 slices" in said
    assert read_index(find_source("800", "nnUNetMiMPlans", "3d_fullres"))[0].names.tolist() == [
        f"scan{i}" for i in range(3)
    ]
    assert sorted(p.name for p in preparing.folder().glob("*.b2nd")) == sorted(
        f"scan{i}{end}" for i in range(3) for end in (".b2nd", "_seg.b2nd")
    )


def test_a_doubtful_case_is_prepared_and_named_wherever_the_user_looks(preparing, images, here, monkeypatch, capsys):
    """A warning of the header and one of the voxels, of a case that is new and when nothing is new any more."""
    read_header = prepare.read_header

    def doubt(volume, min_slices):
        header = read_header(volume, min_slices)
        return replace(header, warnings=("tilted (3 degrees)",)) if volume.name == "scan1" else header

    monkeypatch.setattr(prepare, "read_header", doubt)
    monkeypatch.setattr(prepare_case, "voxel_warnings", lambda ct: ("bright (2,000 HU)",) if ct.max() > 1010 else ())
    for _ in range(2):
        assert preparing.new(images) == 0
        said = capsys.readouterr().out
        doubtful = {name: entry for name, entry in preparing.log().prepared.items() if entry["warnings"]}
        assert doubtful["scan1"]["warnings"][0] == "tilted (3 degrees)"
        assert f"{NAME}: 3 cases prepared, {len(doubtful)} of them doubtful, 0 left out\n" in said
        assert f"      1 doubtful: tilted                 e.g. {images}/scan1.nii.gz: tilted (3 degrees)\n" in said
        with preparing.log().path.with_name("nnUNetMiMPlans_3d_fullres_doubtful.csv").open(encoding="utf-8") as file:
            rows = [(row["case"], row["file"], row["warning"]) for row in csv.DictReader(file)]
        assert rows[rows.index(("scan1", str(images / "scan1.nii.gz"), "tilted (3 degrees)"))]
        assert len(rows) == sum(len(entry["warnings"]) for entry in doubtful.values())
        page = preparing.log().path.with_suffix(".html").read_text("utf-8")
        assert "Accepted, but doubtful" in page
        assert (
            f"3 cases are ready for pretraining, {len(doubtful)} of them are doubtful, no image was left out." in page
        )


def test_the_index_is_there_already(preparing, images, here, monkeypatch):
    preparing.new(images)
    source = find_source("800", "nnUNetMiMPlans", "3d_fullres")
    original = case_index._describe_case
    monkeypatch.setattr(case_index, "_describe_case", lambda *_: pytest.fail("read again"))
    index, bad = read_index(source)
    assert bad == {}
    for info in index:
        assert replace(info, image_sha256="") == original(source, info.case)
    reader = SimpleITKIOWithReorient()
    (scan1,) = [info for info in index if info.case == "scan1"]
    image_sha256 = scan1.image_sha256
    assert image_sha256 == voxel_sha256(reader.read_images([str(images / "scan1.nii.gz")])[0])


def test_the_hash_of_an_image_outlives_a_copy_of_its_case_and_is_in_checkpoints(preparing, images, here):
    """A copied file has another time and is read again; what mim_prepare knew of its image is still true."""
    preparing.new(images)
    source = find_source("800", "nnUNetMiMPlans", "3d_fullres")
    before, _ = read_index(source)
    path = source.case_file("scan1")
    shutil.copy(path, path.with_suffix(".copy"))
    path.with_suffix(".copy").rename(path)
    os.utime(path, (1, 1))
    after, _ = read_index(source)
    assert list(after) == list(before)
    records = Cases([source], [after]).records()
    assert [record["image_sha256"] for record in records] == [info.image_sha256 for info in before]
    without = [{k: v for k, v in record.items() if k != "image_sha256"} for record in records]
    assert merged_records(records, without) == records, "a later record that knows less takes nothing away"
    other = [{**records[0], "sha256": "1" * 64}]
    assert merged_records(records, other) == [*records, *other]


def test_only_what_is_new_or_changed_is_prepared_again(preparing, images, ct, here, monkeypatch):
    preparing.new(images)
    done, original = [], prepare_case.prepare_case
    monkeypatch.setattr(prepare_case, "prepare_case", lambda job, to: done.append(job.case.name) or original(job, to))
    preparing.new(images)
    assert done == []
    sitk.WriteImage(ct(9), str(images / "another.nii.gz"))
    sitk.WriteImage(ct(10), str(images / "scan1.nii.gz"))
    (preparing.folder() / "scan2.b2nd").unlink()
    preparing.new(images)
    assert sorted(done) == ["another", "scan1", "scan2"]
    assert len(preparing.log().prepared) == 4


def test_cases_of_earlier_calls_stay_and_keep_their_place_among_duplicates(preparing, images, tmp_path, ct, here):
    preparing.new(images)
    (tmp_path / "more").mkdir()
    shutil.copy(images / "scan2.nii.gz", tmp_path / "more" / "a_copy.nii.gz")
    sitk.WriteImage(ct(11), str(tmp_path / "more" / "b.nii.gz"))
    preparing.new(tmp_path / "more")
    assert list(preparing.log().prepared) == ["b", "scan0", "scan1", "scan2"]
    assert preparing.log().skipped["a_copy"]["reason"] == "a duplicate (the same image as scan2)"
    content = json.loads((preparing.folder().parent / "dataset.json").read_text())
    assert list(content["dataset"]) == ["b", "scan0", "scan1", "scan2"]
    assert content["numTraining"] == 4


def test_another_spacing_needs_another_name_or_overwrite(preparing, images, here, refused):
    preparing.new(images)
    line = refused("-d", "800", "-i", images, "-s", "5", "-np", "1")
    assert "another spacing or normalisation" in line
    assert "choose another name with -p, or --overwrite" in line
    assert main(["-d", "800", "-i", str(images), "-s", "5", "-np", "1", "--overwrite"]) == 0
    assert preparing.voxels("scan0")[0].shape == (1, 19, 17, 19)
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1", "-p", "Other"]) == 0
    assert preparing.voxels("scan0", plans="Other")[0].shape == (1, 24, 21, 24)


def test_a_case_that_is_left_out_later_leaves_no_files(preparing, images, ct, here):
    preparing.new(images)
    sitk.WriteImage(ct(1)[:, :, :8], str(images / "scan1.nii.gz"))  # now too thin
    sitk.WriteImage(sitk.Cast(ct(2) > 0, sitk.sitkUInt8), str(images / "scan2.nii.gz"))  # now a label map
    preparing.new(images)
    assert list(preparing.log().prepared) == ["scan0"]
    assert {p.name.split(".")[0] for p in preparing.folder().iterdir()} == {"scan0", "scan0_seg"}


def test_a_duplicate_takes_over_when_the_first_one_goes(preparing, images, ct, here):
    shutil.copy(images / "scan1.nii.gz", images / "twin.nii.gz")
    preparing.new(images)
    assert preparing.log().skipped["twin"]["same_as"] == "scan1"
    sitk.WriteImage(ct(20), str(images / "scan1.nii.gz"))
    preparing.new(images)
    assert sorted(preparing.log().prepared) == ["scan0", "scan1", "scan2", "twin"]


def test_overwrite_begins_anew(preparing, images, tmp_path, ct, here):
    preparing.new(images)
    (tmp_path / "other").mkdir()
    sitk.WriteImage(ct(30), str(tmp_path / "other" / "b.nii.gz"))
    assert main(["-d", "800", "-i", str(tmp_path / "other"), "-s", "5", "-np", "1", "--overwrite"]) == 0
    assert list(preparing.log().prepared) == ["b"]
    assert {p.name.split(".")[0] for p in preparing.folder().iterdir()} == {"b", "b_seg"}


def test_a_bad_setting_leaves_the_dataset_free_for_the_right_one(preparing, images, here):
    assert main(["-d", "800", "-n", "Mine", "-i", str(images), "-np", "1", "--set", "no_such=1"]) == 2
    assert preparing.new(images) == 0


def test_plans_are_kept_unless_something_is_asked_for(preparing, images, here):
    preparing.new(images)
    file = preparing.folder().parent / "nnUNetMiMPlans.json"
    plans = json.loads(file.read_bytes())
    plans["mim_finetune"]["num_epochs"] = 7
    file.write_text(json.dumps(plans))
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1"]) == 0
    assert json.loads(file.read_bytes()) == plans
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1", "--set", "num_epochs=9"]) == 0
    assert json.loads(file.read_bytes())["mim_finetune"]["num_epochs"] == 9


def test_strict(preparing, images, here, refused):
    assert main(["-d", "800", "-n", "Mine", "-i", str(images), "-s", "4", "-np", "1", "--strict"]) == 0
    (images / "broken.nii.gz").write_bytes(b"")
    assert "--strict: 1 left out" in refused("-d", "800", "-i", images, "-s", "4", "-np", "1", "--strict")
