"""Folders that may not be written, and disks that are full or read-only: one line, and nothing half written."""

import builtins
import errno
import io
import json
import os
from pathlib import Path

import pytest

from nnunet_mim.inspection.cli import main as mim_inspect
from nnunet_mim.inspection.export_cli import main as mim_export
from nnunet_mim.preparation.cli import main as mim_plan
from nnunet_mim.pretraining.cli import main as mim_pretrain

SMALL = ["-d", "900", "-p", "tinyPlans", "--preset", "tiny", "--view", "32", "--scale", "2", "2", "2", "-device", "cpu",
         "--children", "2", "1", "--iterations", "1", "--batch", "1", "--workers", "0"]  # fmt: skip
REASONS = {
    errno.EACCES: "Permission denied", errno.EROFS: "Read-only file system", errno.ENOSPC: "No space left on device",
}  # fmt: skip
FOLDERS = "mkdir"
FILES = "open"


@pytest.fixture
def closed():
    """closed(patch, place, number, what): nothing more can be made below a place; `what` is `mkdir` (folders and files)
    or `open` (files only). Calls are patched, as root may write everywhere.
    """

    def close(patch, place, number, what):
        def refusing(call, writes):
            def checked(path, *arguments, **options):
                below = isinstance(path, (str, Path)) and str(path).startswith(str(place))
                if below and writes(*arguments, **options):
                    raise OSError(number, os.strerror(number), str(path))
                return call(path, *arguments, **options)

            return checked

        def for_writing(mode="r", *_, **__):
            return bool(set(mode) & set("wax+"))

        patch.setattr(io, "open", refusing(io.open, for_writing))
        patch.setattr(builtins, "open", io.open)
        patch.setattr(os, "open", refusing(os.open, lambda flags, *_, **__: bool(flags & os.O_WRONLY)))
        if what == FOLDERS:
            patch.setattr(os, "mkdir", refusing(os.mkdir, lambda *_, **__: True))

    return close


@pytest.fixture
def dataset(write_dataset):
    """Folder of a dataset in nnUNet_preprocessed."""
    base = write_dataset(n=2).parent
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (base / "dataset.json").write_text(json.dumps(description))
    fingerprint = {"spacings": [[3.0] * 3], "shapes_after_crop": [[48] * 3]}
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return base


COMMANDS = {
    "mim_inspect": lambda place: mim_inspect(["tiny-ct", "-o", str(place / "out")]),
    "mim_export": lambda place: mim_export(["tiny-ct", "-o", str(place / "out")]),
    "mim_plan": lambda place: mim_plan(["-d", "900", "-p", "tinyPlans", "-pc", "tiny-ct", "-o", "Mine"]),
    "mim_pretrain": lambda place: mim_pretrain(SMALL),
}
PLACES = {"mim_inspect": "", "mim_export": "", "mim_plan": "preprocessed", "mim_pretrain": "results"}


WAYS = [(errno.EACCES, FOLDERS), (errno.EROFS, FOLDERS), (errno.ENOSPC, FOLDERS), (errno.EROFS, FILES),
        (errno.ENOSPC, FILES)]  # fmt: skip


def files_in(folder):
    """Files but for locks, and the index of cases, which is whole where it is there."""
    found = (path for path in folder.rglob("*") if path.is_file() and "mim_case_index" not in path.parts)
    return {path for path in found if path.suffix != ".lock"}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_and_nothing_half_written(dataset, closed, tmp_path, capsys, monkeypatch, name):
    place = tmp_path / PLACES[name]
    place.mkdir(exist_ok=True)
    if name == "mim_pretrain":
        (place / "Dataset900_Tiny").mkdir()
    before = files_in(tmp_path)
    for number, what in WAYS:
        with monkeypatch.context() as patch:
            closed(patch, place, number, what)
            code = COMMANDS[name](place)
        said = capsys.readouterr().err
        assert code == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert errors == said.splitlines()[-1:]
        assert str(place) in errors[0]
        assert REASONS[number] in errors[0]
        assert files_in(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["mim_inspect", "mim_export", "mim_plan"])
def test_a_folder_that_another_user_owns(dataset, tmp_path, capsys, name):
    place = dataset if name == "mim_plan" else tmp_path / "closed"
    place.mkdir(exist_ok=True)
    place.chmod(0o500)
    try:
        code = COMMANDS[name](place)
    finally:
        place.chmod(0o700)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert (code, str(place) in line, "Permission denied" in line) == (2, True, True), line
    assert not {path.name for path in place.iterdir()} & {"out", "Mine.json"}


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")


@pytest.mark.long
@needs_full
def test_a_disk_that_is_full_while_a_checkpoint_is_written(dataset, tmp_path, capsys, monkeypatch):
    """The first byte that does not fit: what was there before stays, and the line says how to go on."""
    real = Path.open

    def to_a_full_disk(self, mode="r", *arguments, **options):
        if "w" in mode and self.name.startswith("checkpoint_"):
            return real(Path("/dev/full"), "wb")
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", to_a_full_disk)
    assert mim_pretrain([*SMALL, "--set", "val_crops=1", "probe_every=0"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: cannot write ")
    assert "free some disk space and continue with --c" in line
    assert not list(tmp_path.rglob("checkpoint_*"))
