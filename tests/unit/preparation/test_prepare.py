"""`mim_prepare` on small made-up CT, with nnU-Net's own code inside."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.preparation import prepare, prepare_case, workers
from nnunet_mim.preparation.case_log import CaseLog
from nnunet_mim.preparation.prepare_cli import main
from nnunet_mim.pretraining import case_index
from nnunet_mim.pretraining.case_index import read_index
from nnunet_mim.pretraining.sources import find_source

NAME = "Dataset800_Mine"


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Cases are prepared in this process: faster, and monkeypatching works."""

    def run_jobs(jobs, processes):
        for job in jobs:
            yield job.case, prepare_case.prepare_case(job, tempfile.mkdtemp(dir=tmp_path))

    monkeypatch.setattr(prepare, "run_jobs", run_jobs)


@pytest.fixture
def images(tmp_path, ct):
    """A folder with three CT."""
    (tmp_path / "ct").mkdir()
    for i in range(3):
        sitk.WriteImage(ct(i), str(tmp_path / "ct" / f"scan{i}.nii.gz"))
    return tmp_path / "ct"


def mim_prepare(*arguments, spacing="4"):
    return main(["-d", *map(str, arguments), "-s", *spacing.split(), "--preset", "tiny", "-np", "1"])


def new(*folders, **kwargs):
    return mim_prepare(800, "-n", "Mine", "-i", *folders, **kwargs)


def refused(capsys, *arguments):
    """Run the command, which must fail with one line; returns it."""
    assert main(list(map(str, arguments))) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def folder_of(root, dataset=NAME, plans="nnUNetMiMPlans"):
    return root / "nnUNet_preprocessed" / dataset / f"{plans}_3d_fullres"


def voxels(root, case, dataset=NAME, plans="nnUNetMiMPlans"):
    folder = folder_of(root, dataset, plans)
    data, seg, _, properties = infer_dataset_class(str(folder))(str(folder), [case]).load_case(case)
    return np.asarray(data[:]), np.asarray(seg[:]), properties


def log_of(root, dataset=NAME):
    return CaseLog(root / "nnUNet_preprocessed" / dataset / "mim_prepare" / "nnUNetMiMPlans_3d_fullres.jsonl")


def test_a_folder_becomes_a_dataset_that_nnunet_reads(nnunet_folders, images, here, capsys):
    assert new(images) == 0
    said = capsys.readouterr().out
    assert f"{NAME}: 3 cases prepared, 0 left out" in said
    assert "next: mim_pretrain -d 800 -p nnUNetMiMPlans --preset tiny\n" in said
    folder = folder_of(nnunet_folders)
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
    assert content == json.loads((nnunet_folders / "nnUNet_raw" / NAME / "dataset.json").read_text())
    assert content["dataset"]["scan1"]["images"] == [str(images / "scan1.nii.gz")]
    assert not list((nnunet_folders / "nnUNet_raw" / NAME / "imagesTr").iterdir()), "nothing was copied"
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        "dataset.json", "dataset_fingerprint.json", "mim_case_index", "mim_prepare", "nnUNetMiMPlans.json",
        "nnUNetMiMPlans_3d_fullres",
    ]  # fmt: skip
    page = (folder.parent / "mim_prepare" / "nnUNetMiMPlans_3d_fullres.html").read_text("utf-8")
    assert "3 cases are ready for pretraining, 0 images were left out." in page
    assert page.count("<img ") == 2


def test_voxels_are_those_of_stock_nnunet(nnunet_folders, images, here):
    new(images)
    plans = PlansManager(str(folder_of(nnunet_folders).parent / "nnUNetMiMPlans.json"))
    for i in range(3):
        expected, seg, properties = DefaultPreprocessor(verbose=False).run_case(
            [str(images / f"scan{i}.nii.gz")], None, plans, plans.get_configuration("3d_fullres"), {}
        )
        found, found_seg, found_properties = voxels(nnunet_folders, f"scan{i}")
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.array_equal(found_seg, seg)
        assert found_properties.pop("class_locations") == {}
        assert str(found_properties) == str(properties)


def test_dicom_and_turned_files_give_the_same_voxels(nnunet_folders, tmp_path, ct, dicom, here):
    """A DICOM series, the file it was written from, and the same in other orientations are one image."""
    for name in ("file", "series", "turned"):
        (tmp_path / name).mkdir()
    image = ct(5)
    sitk.WriteImage(image, str(tmp_path / "file" / "a.nii.gz"))
    dicom(image, tmp_path / "series" / "a")
    sitk.WriteImage(sitk.DICOMOrient(image, "PIR"), str(tmp_path / "turned" / "a.nrrd"))
    for number, name in enumerate(("file", "series", "turned")):
        assert mim_prepare(801 + number, "-n", "X", "-i", tmp_path / name) == 0
    first, _, properties = voxels(nnunet_folders, "a", "Dataset801_X")
    assert first.shape == (1, 24, 21, 24)
    for number in (802, 803):
        other, _, other_properties = voxels(nnunet_folders, "a", f"Dataset{number}_X")
        np.testing.assert_allclose(other, first, atol=1e-5)
        for key in ("origin", "direction"):
            assert other_properties["sitk_stuff"][key] == pytest.approx(properties["sitk_stuff"][key], abs=1e-4)
    (copied,) = (nnunet_folders / "nnUNet_raw" / "Dataset802_X" / "imagesTr").iterdir()
    assert copied.name == "a_0000.nii.gz"
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(copied))), sitk.GetArrayFromImage(image))


def test_what_is_no_ct_is_left_out_with_its_reason(nnunet_folders, images, ct, dicom, here, capsys):
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
    assert new(images) == 0
    said = capsys.readouterr().out
    assert "3 cases prepared, 8 left out" in said
    table = log_of(nnunet_folders).path.with_name("nnUNetMiMPlans_3d_fullres_skipped.csv")
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
    assert sorted(p.name for p in folder_of(nnunet_folders).glob("*.b2nd")) == sorted(
        f"scan{i}{end}" for i in range(3) for end in (".b2nd", "_seg.b2nd")
    )


def test_the_index_is_there_already(nnunet_folders, images, here, monkeypatch):
    new(images)
    source = find_source("800", "nnUNetMiMPlans", "3d_fullres")
    original = case_index.describe_case
    monkeypatch.setattr(case_index, "describe_case", lambda *_: pytest.fail("read again"))
    index, bad = read_index(source)
    assert bad == []
    for info in index:
        assert info == original(source, info.case)


def test_only_what_is_new_or_changed_is_prepared_again(nnunet_folders, images, ct, here, monkeypatch):
    new(images)
    done, original = [], prepare_case.prepare_case
    monkeypatch.setattr(prepare_case, "prepare_case", lambda job, to: done.append(job.case) or original(job, to))
    new(images)
    assert done == []
    sitk.WriteImage(ct(9), str(images / "another.nii.gz"))
    sitk.WriteImage(ct(10), str(images / "scan1.nii.gz"))
    (folder_of(nnunet_folders) / "scan2.b2nd").unlink()
    new(images)
    assert sorted(done) == ["another", "scan1", "scan2"]
    assert len(log_of(nnunet_folders).prepared) == 4


def test_cases_of_earlier_calls_stay_and_keep_their_place_among_duplicates(nnunet_folders, images, tmp_path, ct, here):
    new(images)
    (tmp_path / "more").mkdir()
    shutil.copy(images / "scan2.nii.gz", tmp_path / "more" / "a_copy.nii.gz")
    sitk.WriteImage(ct(11), str(tmp_path / "more" / "b.nii.gz"))
    new(tmp_path / "more")
    assert list(log_of(nnunet_folders).prepared) == ["b", "scan0", "scan1", "scan2"]
    assert log_of(nnunet_folders).skipped["a_copy"]["reason"] == "a duplicate (the same image as scan2)"
    content = json.loads((folder_of(nnunet_folders).parent / "dataset.json").read_text())
    assert list(content["dataset"]) == ["b", "scan0", "scan1", "scan2"]
    assert content["numTraining"] == 4


def test_another_spacing_needs_another_name_or_overwrite(nnunet_folders, images, here, capsys):
    new(images)
    line = refused(capsys, "-d", "800", "-i", images, "-s", "5", "-np", "1")
    assert "another spacing or normalisation" in line
    assert "choose another name with -p, or --overwrite" in line
    assert main(["-d", "800", "-i", str(images), "-s", "5", "-np", "1", "--overwrite"]) == 0
    assert voxels(nnunet_folders, "scan0")[0].shape == (1, 19, 17, 19)
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1", "-p", "Other"]) == 0
    assert voxels(nnunet_folders, "scan0", plans="Other")[0].shape == (1, 24, 21, 24)


def write_raw(root, dataset, images, labels=None):
    """A dataset in nnUNet_raw."""
    raw = root / "nnUNet_raw" / dataset
    (raw / "imagesTr").mkdir(parents=True)
    for i, channels in enumerate(images):
        for c, image in enumerate(channels):
            sitk.WriteImage(image, str(raw / "imagesTr" / f"case_{i}_{c:04d}.nii.gz"))
        if labels is not None:
            (raw / "labelsTr").mkdir(exist_ok=True)
            sitk.WriteImage(labels[i], str(raw / "labelsTr" / f"case_{i}.nii.gz"))
    names = {str(c): name for c, name in enumerate(("CT", "PET")[: len(images[0])])}
    content = {"channel_names": names, "labels": {"background": 0, "organ": 1}, "numTraining": len(images)}
    (raw / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    return raw


def organ_of(image):
    label = sitk.Cast(image > 20, sitk.sitkUInt8)
    label.CopyInformation(image)
    return label


@pytest.mark.slow
def test_a_labelled_dataset_equals_stock_preprocessing(nnunet_folders, ct, here):
    """Another folder, nnUNetv2_preprocess with the same plans: every file of it is the same."""
    cts = [ct(i, spacing=(4.0, 3.0, 2.0 + i)) for i in range(2)]
    write_raw(nnunet_folders, "Dataset501_L", [[image] for image in cts], [organ_of(image) for image in cts])
    assert mim_prepare(501) == 0
    base = nnunet_folders / "nnUNet_preprocessed" / "Dataset501_L"
    found = {case: voxels(nnunet_folders, case, "Dataset501_L") for case in ("case_0", "case_1")}
    shutil.rmtree(base / "nnUNetMiMPlans_3d_fullres")
    shutil.move(base / "gt_segmentations", base / "gt_before")
    command = [os.path.join(os.path.dirname(sys.executable), "nnUNetv2_preprocess")]
    subprocess.run(
        [*command, "-d", "501", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    for case, (data, seg, properties) in found.items():
        expected, expected_seg, expected_properties = voxels(nnunet_folders, case, "Dataset501_L")
        np.testing.assert_allclose(data, expected, atol=1e-5)
        assert np.array_equal(seg, expected_seg)
        locations, expected_locations = (p.pop("class_locations") for p in (properties, expected_properties))
        assert np.array_equal(locations[1], expected_locations[1])
        assert str(properties) == str(expected_properties)
    for path in (base / "gt_segmentations").iterdir():
        assert path.read_bytes() == (base / "gt_before" / path.name).read_bytes()


def test_two_channels_without_labels(nnunet_folders, ct, here):
    pet = sitk.Cast(sitk.Abs(ct(3)), sitk.sitkFloat32)
    write_raw(nnunet_folders, "Dataset502_P", [[ct(i), pet] for i in range(2)])
    assert mim_prepare(502) == 0
    data, _, _ = voxels(nnunet_folders, "case_1", "Dataset502_P")
    assert data.shape[0] == 2
    assert abs(data[1].mean()) < 0.2  # z-scored
    assert find_source("502", "nnUNetMiMPlans", "3d_fullres").normalization == (
        "CTNormalization",
        "ZScoreNormalization",
    )


def test_labels_for_some_cases_only(nnunet_folders, ct, here, capsys):
    raw = write_raw(nnunet_folders, "Dataset503_H", [[ct(i)] for i in range(2)], [organ_of(ct(i)) for i in range(2)])
    (raw / "labelsTr" / "case_1.nii.gz").unlink()
    assert "case_1.nii.gz is missing, others are there" in refused(capsys, "-d", "503")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["800", "-i", "ct"], "give the new dataset a name"),
        (["800", "-n", "My CT", "-i", "ct"], "give the new dataset a name"),
        (["0", "-n", "X", "-i", "ct"], "-d 0: give a number from 1 to 999"),
        (["800", "801", "-n", "X", "-i", "ct"], "-i makes one dataset"),
        (["800", "-n", "X"], "-n names a new dataset"),
        (["800"], "unknown dataset '800'"),
        (["800", "-n", "X", "-i", "gone"], "gone is not a folder"),
        (["800", "-n", "X", "-i", "ct", "-s", "1", "2"], "-s takes one number or three"),
        (["800", "-n", "X", "-i", "ct", "-s", "0"], "-s takes one number or three"),
        (["800", "-n", "X", "-i", "ct", "-np", "0"], "-np must be at least 1"),
        (["800", "-n", "X", "-i", "ct", "--set", "no_such=1"], "no_such"),
    ],
)
def test_bad_arguments(nnunet_folders, images, here, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(nnunet_folders)
    assert says in refused(capsys, "-d", *arguments)
    assert not list((nnunet_folders / "nnUNet_preprocessed").rglob("*.b2nd"))


def test_a_dataset_of_the_user_is_not_touched(nnunet_folders, images, ct, here, capsys):
    raw = write_raw(nnunet_folders, NAME, [[ct(0)]])
    before = sorted(raw.rglob("*"))
    assert "holds a dataset that -i has not made" in refused(capsys, "-d", "800", "-i", images)
    assert sorted(raw.rglob("*")) == before


def test_nothing_usable(nnunet_folders, images, here, capsys):
    for path in images.iterdir():
        path.write_bytes(b"")
    assert "none of 3 images can be used (scan0: cannot be read" in refused(
        capsys, "-d", "800", "-n", "X", "-i", images
    )


@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_variables_that_are_not_set(nnunet_folders, images, capsys, monkeypatch, name):
    monkeypatch.delenv(name)
    assert name in refused(capsys, "-d", "800", "-n", "X", "-i", images)


def test_half_a_line_in_the_log_does_not_count(tmp_path):
    log = CaseLog(tmp_path / "new" / "log.jsonl")
    log.add({"case": "a", "key": "1"})
    log.add({"case": "b", "key": "1", "reason": "x"})
    with log.path.open("a") as file:
        file.write('{"case": "c", "ke')  # the power went
    again = CaseLog(log.path)
    assert (list(again.prepared), list(again.skipped)) == (["a"], ["b"])
    again.add({"case": "d", "key": "2"})
    assert list(CaseLog(log.path).prepared) == ["a", "d"]


@pytest.mark.slow
def test_killed_and_repeated(nnunet_folders, tmp_path, ct):
    """A real command with worker processes, killed while it works; the second call does the rest only."""
    (tmp_path / "ct").mkdir()
    for i in range(12):
        sitk.WriteImage(ct(i, shape=(40, 44, 48)), str(tmp_path / "ct" / f"scan{i:02d}.nii.gz"))
    command = [sys.executable, "-m", "nnunet_mim.preparation.prepare_cli", "-d", "800", "-n", "Mine", "-np", "2"]
    command += ["-i", str(tmp_path / "ct"), "-s", "2", "--preset", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = log_of(nnunet_folders).path
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < 3):
        pass
    assert process.poll() is None, "it was to be killed, but ended"
    os.killpg(process.pid, 9)
    process.wait()
    before = CaseLog(log).prepared
    assert 3 <= len(before) < 12
    stamps = {case: (folder_of(nnunet_folders) / f"{case}.b2nd").stat().st_mtime_ns for case in before}
    subprocess.run(command, check=True, capture_output=True)
    assert len(CaseLog(log).prepared) == 12
    for case, stamp in stamps.items():
        assert (folder_of(nnunet_folders) / f"{case}.b2nd").stat().st_mtime_ns == stamp
    assert len(list(folder_of(nnunet_folders).iterdir())) == 3 * 12
    index, bad = read_index(find_source("800", "nnUNetMiMPlans", "3d_fullres"))
    assert (len(index), bad) == (12, [])


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_names_the_case(nnunet_folders, images, monkeypatch, capsys):
    monkeypatch.setattr(workers, "prepare_case", _die)
    line = refused(capsys, "-d", "800", "-n", "Mine", "-i", images, "-np", "1")
    assert "a worker process died (out of memory?) at one of these cases: scan" in line
    monkeypatch.undo()


def _die(job, partial):
    open(f"{partial}/{job.case}.running", "w").close()
    os.kill(os.getpid(), 9)


def test_folders_are_never_added_to_a_labelled_dataset(nnunet_folders, images, ct, here, capsys):
    raw = write_raw(nnunet_folders, "Dataset501_L", [[ct(0)], [ct(1)]], [organ_of(ct(0)), organ_of(ct(1))])
    assert mim_prepare(501) == 0
    before = (raw / "dataset.json").read_bytes()
    assert "holds a dataset that -i has not made" in refused(capsys, "-d", "501", "-i", images, "-s", "4", "-np", "1")
    assert (raw / "dataset.json").read_bytes() == before


def test_a_case_that_is_left_out_later_leaves_no_files(nnunet_folders, images, ct, here):
    new(images)
    sitk.WriteImage(ct(1)[:, :, :8], str(images / "scan1.nii.gz"))  # now too thin
    sitk.WriteImage(sitk.Cast(ct(2) > 0, sitk.sitkUInt8), str(images / "scan2.nii.gz"))  # now a label map
    new(images)
    assert list(log_of(nnunet_folders).prepared) == ["scan0"]
    assert {p.name.split(".")[0] for p in folder_of(nnunet_folders).iterdir()} == {"scan0", "scan0_seg"}


def test_a_duplicate_takes_over_when_the_first_one_goes(nnunet_folders, images, ct, here):
    shutil.copy(images / "scan1.nii.gz", images / "twin.nii.gz")
    new(images)
    assert log_of(nnunet_folders).skipped["twin"]["same_as"] == "scan1"
    sitk.WriteImage(ct(20), str(images / "scan1.nii.gz"))
    new(images)
    assert sorted(log_of(nnunet_folders).prepared) == ["scan0", "scan1", "scan2", "twin"]


def test_overwrite_begins_anew(nnunet_folders, images, tmp_path, ct, here):
    new(images)
    (tmp_path / "other").mkdir()
    sitk.WriteImage(ct(30), str(tmp_path / "other" / "b.nii.gz"))
    assert main(["-d", "800", "-i", str(tmp_path / "other"), "-s", "5", "-np", "1", "--overwrite"]) == 0
    assert list(log_of(nnunet_folders).prepared) == ["b"]
    assert {p.name.split(".")[0] for p in folder_of(nnunet_folders).iterdir()} == {"b", "b_seg"}


def test_what_could_not_be_read_is_tried_again_and_a_full_disk_is_no_reason(nnunet_folders, images, here, monkeypatch):
    original = prepare_case.DefaultPreprocessor.run_case_npy

    def fail(self, data, *args):
        raise IndexError("a hiccup of the storage")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_case.DefaultPreprocessor, "run_case_npy", fail)
        assert new(images) == 2
    assert {e["reason"] for e in log_of(nnunet_folders).skipped.values()} == {
        "cannot be read or prepared (a hiccup of the storage)"
    }
    assert prepare_case.DefaultPreprocessor.run_case_npy is original

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_case, "save", full)
        assert new(images) == 2
    assert new(images) == 0
    assert len(log_of(nnunet_folders).prepared) == 3


def test_a_bad_setting_leaves_the_dataset_free_for_the_right_one(nnunet_folders, images, here):
    assert main(["-d", "800", "-n", "Mine", "-i", str(images), "-np", "1", "--set", "no_such=1"]) == 2
    assert new(images) == 0


def test_plans_are_kept_unless_something_is_asked_for(nnunet_folders, images, here):
    new(images)
    file = folder_of(nnunet_folders).parent / "nnUNetMiMPlans.json"
    plans = json.loads(file.read_bytes())
    plans["mim_finetune"]["num_epochs"] = 7
    file.write_text(json.dumps(plans))
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1"]) == 0
    assert json.loads(file.read_bytes()) == plans
    assert main(["-d", "800", "-i", str(images), "-s", "4", "-np", "1", "--set", "num_epochs=9"]) == 0
    assert json.loads(file.read_bytes())["mim_finetune"]["num_epochs"] == 9


def test_strict(nnunet_folders, images, here, capsys):
    assert main(["-d", "800", "-n", "Mine", "-i", str(images), "-s", "4", "-np", "1", "--strict"]) == 0
    (images / "broken.nii.gz").write_bytes(b"")
    assert "--strict: 1 left out" in refused(capsys, "-d", "800", "-i", images, "-s", "4", "-np", "1", "--strict")
