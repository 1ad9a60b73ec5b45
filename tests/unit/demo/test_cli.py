"""`mim_demo` refuses what cannot work with one line, before it writes anything."""

from __future__ import annotations

import pytest

from nnunet_mim.demo.cli import main


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


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text
    assert "index.html" in text
