"""`mim_demo` refuses what cannot work with one line, before it writes anything."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_mim.demo.cli import main
from nnunet_mim.demo.phantoms import make_phantom


def refused(capsys, *argv: str) -> str:
    assert main([*argv, "-device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_existing_folder(tmp_path, capsys) -> None:
    (tmp_path / "something").touch()
    assert "--continue" in refused(capsys, "-o", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize("flag", ["--c", "--continue"])
def test_nothing_to_continue(tmp_path, capsys, flag) -> None:
    assert "leave out --continue" in refused(capsys, "-o", str(tmp_path / "new"), flag)
    assert not (tmp_path / "new").exists()


def test_too_few_bodies(tmp_path, capsys) -> None:
    assert "at least 5" in refused(capsys, "-o", str(tmp_path / "new"), "--bodies", "4")
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_way(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    refused(capsys, "-o", str(tmp_path / "file" / "below"))


def test_interrupted(tmp_path, capsys, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_mim.demo.cli.run_stages", interrupted)
    assert main(["-o", str(tmp_path / "a demo"), "-device", "cpu"]) == 130
    said = capsys.readouterr().err
    assert said == f"interrupted\nto go on: mim_demo -o '{tmp_path}/a demo' --continue\n"


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text
    assert "index.html" in text


def test_a_ct_of_the_users(tmp_path, capsys) -> None:
    image = sitk.GetImageFromArray(np.round(make_phantom(0, (48, 48, 48))[0]).astype(np.int16))
    image.SetSpacing((6.0, 6.0, 6.0))
    sitk.WriteImage(image, str(tmp_path / "ct.nii.gz"))
    assert main(["--ct", str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "looks")]) == 0
    said = capsys.readouterr().out
    assert "next: mim_plan -d DATASET -pc tiny-ct" in said
    page = (tmp_path / "looks" / "report.html").read_text()
    assert "Case ct" in page
    assert (tmp_path / "looks" / "ct_level3_reconstruction.nii.gz").is_file()
    assert main(["--ct", str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "looks")]) == 2
    assert "is not empty: choose another folder" in capsys.readouterr().err


def test_no_weights_for_a_ct(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("nnunet_mim.demo.cli.shipped_weights", list)
    assert main(["--ct", "ct.nii.gz", "-o", str(tmp_path / "looks")]) == 2
    assert "leave out --ct" in capsys.readouterr().err
