"""Files that would crash, hang or fill a command: each is named, and the sound ones are prepared."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import SimpleITK as sitk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names of bytes, pipes, and limits on memory")

HEADER = "ObjectType = Image\nNDims = {}\nDimSize = {}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"


def bad_files(folder, dicom, ct):
    """Write one of each kind; returns how the reason of each case begins."""
    dimensions = "-1\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1 1 1"
    (folder / "crash.mha").write_text(HEADER.format(dimensions, "3 3 3"))
    (folder / "huge.mha").write_text(HEADER.format(3, "40000 40000 1000") + "0" * 100)
    (folder / "empty.nii.gz").touch()
    os.mkfifo(folder / "pipe.nii.gz")
    os.mkfifo(folder / "pipe_without_ending")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(os.path.relpath(folder / "socket.mha"))
    (folder / "device.nrrd").symlink_to("/dev/zero")
    (folder / "gone.nii").symlink_to(folder / "nowhere.nii")
    with open(os.fsencode(folder) + b"/na\xefve.nii", "wb") as file:
        file.write(b"no image")
    dicom(ct(4), folder / "bomb", uid="1.66")
    for file in (folder / "bomb").iterdir():  # rows and columns of 32767, and no more pixels than before
        content = file.read_bytes()
        for tag in (b"\x28\x00\x10\x00\x02\x00\x00\x00", b"\x28\x00\x11\x00\x02\x00\x00\x00"):
            at = content.index(tag) + len(tag)
            content = content[:at] + b"\xff\x7f" + content[at + 2 :]
        file.write_bytes(content)
    return {
        "crash": "cannot be read (its process died of SIG",
        "huge": "damaged (its header promises 3,200,000 MB of voxels, the file has 0.0002",
        "empty": "cannot be read (the file is empty)",
        "pipe": "cannot be read (no regular file: a folder, pipe, socket or device)",
        "socket": "cannot be read (no regular file",
        "device": "cannot be read (no regular file",
        "gone": f"cannot be read ({folder / 'gone.nii'} is not there)",
        "na_xefve": "cannot be read (its name is not UTF-8): rename it",
        "bomb_unreadable": "damaged (its header promises 4,295 MB of voxels, the file has 0.002",
    }


def test_each_is_named_and_the_rest_goes_on(preparing, images, dicom, ct, capsys):
    expected = bad_files(images, dicom, ct)
    assert preparing.new(images) == 0
    said = capsys.readouterr().out
    assert f"3 cases prepared, {len(expected)} left out" in said
    with preparing.log().path.with_name("nnUNetMiMPlans_3d_fullres_skipped.csv").open(encoding="utf-8") as file:
        reasons = {row["case"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons.keys() == expected.keys()
    for case, start in expected.items():
        assert reasons[case].startswith(start), (case, reasons[case])
    assert preparing.new(images) == 0, "the names are the same at the next call"
    assert len(preparing.log().entries) == 3 + len(expected)


def test_a_dataset_in_nnunet_raw(preparing, ct, capsys):
    raw = preparing.write_raw("Dataset502_P", [[ct(i)] for i in range(3)])
    content = json.loads((raw / "dataset.json").read_text())
    names = [f"case_{i}" for i in range(3)]
    listed = {n: {"images": [f"imagesTr/{n}_0000.nii.gz"], "label": f"labelsTr/{n}.nii.gz"} for n in names}
    (raw / "dataset.json").write_text(json.dumps({**content, "dataset": listed}))
    (raw / "imagesTr" / "case_1_0000.nii.gz").unlink()
    os.mkfifo(raw / "imagesTr" / "case_1_0000.nii.gz")
    assert preparing(502) == 0
    said = capsys.readouterr().out
    assert "2 cases prepared, 1 left out" in said
    assert "case_1_0000.nii.gz: cannot be read (no regular file" in said


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(preparing, tmp_path, dicom, ct):
    """While cases of a DICOM series and of files are prepared; the next call prepares them all."""
    dicom(sitk.Expand(ct(3), [4, 4, 2]), tmp_path / "ct" / "series")
    for number in range(4):
        sitk.WriteImage(sitk.Expand(ct(number), [4, 4, 4]), str(tmp_path / "ct" / f"file{number}.nii.gz"))
    command = [sys.executable, "-m", "nnunet_mim.preparation.prepare_cli", "-d", "800", "-n", "Mine", "-np", "2"]
    command += ["-i", str(tmp_path / "ct"), "-s", "2", "--preset", "tiny"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    folder = preparing.folder()
    while process.poll() is None and not list(folder.parent.glob("*.partial-*/*")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("interrupted\n")
    assert not list(folder.parent.glob("*.partial-*"))
    assert not list((preparing.root / "nnUNet_raw").rglob(".*"))
    end = time.monotonic() + 10
    while _group_runs(process.pid) and time.monotonic() < end:  # what serves forks ends a moment later
        time.sleep(0.05)
    assert not _group_runs(process.pid)
    subprocess.run(command, check=True, capture_output=True)
    assert len(preparing.log().prepared) == 5


def _group_runs(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
