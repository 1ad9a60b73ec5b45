"""`mim_prepare -d` on datasets in nnUNet_raw, bad input, and preparations that are interrupted."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.nnunet.datasets import raw_files
from nnunet_mim.nnunet.source import find_source
from nnunet_mim.preparation import prepare_case
from nnunet_mim.preparation.case_log import CaseLog
from nnunet_mim.preparation.cli import main as mim_plan
from nnunet_mim.pretraining.data.case_index import read_index
from nnunet_mim.system.locks import exclusive_lock

NAME = "Dataset800_Mine"


@pytest.mark.slow
def test_a_labelled_dataset_equals_stock_preprocessing(preparing, ct, here):
    """Another folder, nnUNetv2_preprocess with the same plans: every file of it is the same."""
    cts = [ct(i, spacing=(4.0, 3.0, 2.0 + i)) for i in range(2)]
    preparing.write_raw("Dataset501_L", [[image] for image in cts], [preparing.organ_of(image) for image in cts])
    assert preparing(501) == 0
    base = preparing.root / "nnUNet_preprocessed" / "Dataset501_L"
    found = {case: preparing.voxels(case, "Dataset501_L") for case in ("case_0", "case_1")}
    shutil.rmtree(base / "nnUNetMiMPlans_3d_fullres")
    shutil.move(base / "gt_segmentations", base / "gt_before")
    command = [os.path.join(os.path.dirname(sys.executable), "nnUNetv2_preprocess")]
    subprocess.run(
        [*command, "-d", "501", "-plans_name", "nnUNetMiMPlans", "-c", "3d_fullres", "-np", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    for case, (data, seg, properties) in found.items():
        expected, expected_seg, expected_properties = preparing.voxels(case, "Dataset501_L")
        np.testing.assert_allclose(data, expected, atol=1e-5)
        assert np.array_equal(seg, expected_seg)
        locations, expected_locations = (p.pop("class_locations") for p in (properties, expected_properties))
        assert np.array_equal(locations[1], expected_locations[1])
        assert str(properties) == str(expected_properties)
    for path in (base / "gt_segmentations").iterdir():
        assert path.read_bytes() == (base / "gt_before" / path.name).read_bytes()


def test_two_channels_without_labels(preparing, ct, here):
    pet = sitk.Cast(sitk.Abs(ct(3)), sitk.sitkFloat32)
    preparing.write_raw("Dataset502_P", [[ct(i), pet] for i in range(2)])
    assert preparing(502) == 0
    data, _, _ = preparing.voxels("case_1", "Dataset502_P")
    assert data.shape[0] == 2
    assert abs(data[1].mean()) < 0.2  # z-scored
    assert find_source("502", "nnUNetMiMPlans", "3d_fullres").normalization == (
        "CTNormalization",
        "ZScoreNormalization",
    )


def test_mim_plan_on_a_prepared_dataset_says_how(preparing, images, here, capsys):
    assert preparing.new(images) == 0
    for more in ([], ["-pc", "encoder"], ["-p", "TYPO"], ["-p", "nnUNetMiMPlans", "-o", "Other"]):
        assert mim_plan(["-d", "800", *more]) == 2
        said = capsys.readouterr().err
        assert "has no labels, without which nnU-Net cannot preprocess it: write plans with mim_prepare -d 800" in said
    assert not (preparing.folder().parent / "Other.json").exists()


def test_files_are_those_that_nnunet_finds(preparing, ct):
    """nnU-Net's own function forks a pool, so it gets a process without threads."""
    channels, labels = [[ct(i), sitk.Abs(ct(3))] for i in range(3)], [preparing.organ_of(ct(i)) for i in range(3)]
    raw = preparing.write_raw("Dataset502_P", channels, labels)
    program = f"""if True:
        import json
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
        found = get_filenames_of_train_images_and_targets({str(raw)!r})
        print(json.dumps({{str(case): entry for case, entry in found.items()}}))"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, encoding="utf-8")
    expected = json.loads(done.stdout.splitlines()[-1])
    assert raw_files(raw, json.loads((raw / "dataset.json").read_text())) == expected
    assert len(expected) == 3


def test_labels_for_some_cases_only(preparing, ct, here, refused):
    raw = preparing.write_raw(
        "Dataset503_H", [[ct(i)] for i in range(2)], [preparing.organ_of(ct(i)) for i in range(2)]
    )
    (raw / "labelsTr" / "case_1.nii.gz").unlink()
    assert "case_1.nii.gz is missing, others are there" in refused("-d", "503")


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
        (["800", "-n", "X", "-i", "ct", "--set", "spacing=2,2,2"], "--set spacing: give it with -s"),
    ],
)
def test_bad_arguments(preparing, images, here, refused, monkeypatch, arguments, says):
    monkeypatch.chdir(preparing.root)
    assert says in refused("-d", *arguments)
    assert not list((preparing.root / "nnUNet_preprocessed").rglob("*.b2nd"))


def test_a_dataset_of_the_user_is_not_touched(preparing, images, ct, here, refused):
    raw = preparing.write_raw(NAME, [[ct(0)]])
    before = sorted(raw.rglob("*"))
    assert "holds a dataset that -i has not made" in refused("-d", "800", "-i", images)
    assert sorted(raw.rglob("*")) == before


def test_nothing_usable(preparing, images, here, refused):
    for path in images.iterdir():
        path.write_bytes(b"")
    assert "none of 3 images can be used (scan0: cannot be read" in refused("-d", "800", "-n", "X", "-i", images)


@pytest.mark.parametrize("name", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_variables_that_are_not_set(preparing, images, refused, monkeypatch, name):
    monkeypatch.delenv(name)
    assert name in refused("-d", "800", "-n", "X", "-i", images)


def test_two_commands_at_once(preparing, images, here, refused):
    """The second one ends before it has touched anything; another dataset is not locked."""
    lock = preparing.root / "nnUNet_preprocessed" / f".mim_prepare_{NAME}.lock"
    with exclusive_lock(lock, "busy"):
        assert f"another mim_prepare is at work on {NAME}" in refused("-d", "800", "-n", "Mine", "-i", images)
        assert preparing(801, "-n", "Other", "-i", images) == 0
    assert not (preparing.root / "nnUNet_raw" / NAME).exists()
    assert preparing.new(images) == 0


def test_half_a_line_in_the_log_does_not_count(tmp_path):
    log = CaseLog(tmp_path / "new" / "log.jsonl")
    entry = {"key": "1", "files": ["f"], "images": ["f"], "reason": "x"}
    log.add({"case": "a", **entry})
    log.add({"case": "b", **entry})
    with log.path.open("a") as file:
        file.write('{"case": "c", "ke')  # the power went
    again = CaseLog(log.path)
    assert list(again.skipped) == ["a", "b"]
    again.add({"case": "d", **entry})
    assert list(CaseLog(log.path).skipped) == ["a", "b", "d"]


@pytest.mark.slow
def test_killed_and_repeated(preparing, tmp_path, ct):
    """A real command with worker processes, killed while it works; the second call does the rest only."""
    (tmp_path / "ct").mkdir()
    for i in range(12):
        sitk.WriteImage(ct(i, shape=(40, 44, 48)), str(tmp_path / "ct" / f"scan{i:02d}.nii.gz"))
    command = [sys.executable, "-m", "nnunet_mim.preparation.prepare_cli", "-d", "800", "-n", "Mine", "-np", "2"]
    command += ["-i", str(tmp_path / "ct"), "-s", "2", "--preset", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    log = preparing.log().path
    while process.poll() is None and (not log.is_file() or log.read_text().count("\n") < 3):
        pass
    assert process.poll() is None, "it was to be killed, but ended"
    os.killpg(process.pid, 9)
    process.wait()
    before = CaseLog(log).prepared
    assert 3 <= len(before) < 12
    stamps = {case: (preparing.folder() / f"{case}.b2nd").stat().st_mtime_ns for case in before}
    subprocess.run(command, check=True, capture_output=True)
    assert len(CaseLog(log).prepared) == 12
    for case, stamp in stamps.items():
        assert (preparing.folder() / f"{case}.b2nd").stat().st_mtime_ns == stamp
    assert len(list(preparing.folder().iterdir())) == 3 * 12
    index, bad = read_index(find_source("800", "nnUNetMiMPlans", "3d_fullres"))
    assert (len(index), bad) == (12, {})


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for a process at work")
def test_a_worker_that_is_killed_costs_its_case_only(preparing, tmp_path, ct, capsys):
    """The worker at the first case is killed, as the system does where memory is short; the next call does it."""
    (tmp_path / "ct").mkdir()
    sitk.WriteImage(sitk.Expand(ct(0), [9, 9, 9]), str(tmp_path / "ct" / "large.mha"))
    sitk.WriteImage(ct(1), str(tmp_path / "ct" / "small.mha"))

    def kill():
        while not (busy := [p for p in multiprocessing.active_children() if _is_preparing(p.pid)]):
            time.sleep(0.005)
        busy[0].kill()

    def _is_preparing(process):
        at_work = _cpu_seconds(process) > 0.1  # its start takes less, the case several times as much
        return at_work and list(preparing.folder().parent.glob("*.partial-*"))

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert preparing.new(tmp_path / "ct") == 0
    killer.join(timeout=1)
    said = capsys.readouterr().out
    assert "1 cases prepared, 1 left out" in said
    assert "large.mha: cannot be read or prepared (its process died of SIGKILL, out of memory?)" in said
    assert not list(preparing.folder().parent.glob("*.partial-*"))
    assert preparing.new(tmp_path / "ct") == 0
    assert "2 cases prepared, 0 left out" in capsys.readouterr().out


def _cpu_seconds(process):
    with open(f"/proc/{process}/stat") as file:
        return sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")


def test_folders_are_never_added_to_a_labelled_dataset(preparing, images, ct, here, refused):
    raw = preparing.write_raw(
        "Dataset501_L", [[ct(0)], [ct(1)]], [preparing.organ_of(ct(0)), preparing.organ_of(ct(1))]
    )
    assert preparing(501) == 0
    before = (raw / "dataset.json").read_bytes()
    assert "holds a dataset that -i has not made" in refused("-d", "501", "-i", images, "-s", "4", "-np", "1")
    assert (raw / "dataset.json").read_bytes() == before


def test_what_could_not_be_read_is_tried_again_and_a_full_disk_is_no_reason(preparing, images, here, monkeypatch):
    original = prepare_case.DefaultPreprocessor.run_case_npy

    def fail(self, data, *args):
        raise IndexError("a hiccup of the storage")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_case.DefaultPreprocessor, "run_case_npy", fail)
        assert preparing.new(images) == 2
    assert {e["reason"] for e in preparing.log().skipped.values()} == {
        "cannot be read or prepared (a hiccup of the storage)"
    }
    assert prepare_case.DefaultPreprocessor.run_case_npy is original

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_case, "save", full)
        assert preparing.new(images) == 2
    assert preparing.new(images) == 0
    assert len(preparing.log().prepared) == 3


def test_a_dataset_that_is_given_twice(preparing, ct, here, refused):
    preparing.write_raw("Dataset501_L", [[ct(0)]])
    assert "Dataset501_L is there twice, leave out 501" in refused("-d", "Dataset501_L", "501")


def test_what_is_printed_next_can_be_typed(preparing, images, ct, here, capsys, parsed_commands):
    preparing.write_raw("Dataset501_L", [[ct(0)]])
    assert preparing.new(images) == 0
    (given,) = parsed_commands(capsys.readouterr().out.splitlines()[-1])
    assert (given.datasets, given.plans) == (["800"], "nnUNetMiMPlans")
    assert preparing(800, 501, "-p", "Other") == 0
    (given,) = parsed_commands(capsys.readouterr().out.splitlines()[-1])
    assert (given.datasets, given.plans) == (["800", "501"], "Other")
