"""Folders of nnU-Net that cannot be used: one line that names them, and exit code 2."""

import pytest

NEEDS = {
    "mim_plan": (["-d", "901", "--preset", "tiny"], ["nnUNet_preprocessed"]),
    "mim_prepare": (["-d", "901", "-s", "3", "-np", "1"], ["nnUNet_raw", "nnUNet_preprocessed"]),
    "mim_pretrain": (["-d", "901", "-device", "cpu"], ["nnUNet_preprocessed", "nnUNet_results"]),
    "mim_benchmark": (["few_shot", "-d", "901", "-device", "cpu"], ["nnUNet_preprocessed"]),
}
"""of every command that uses nnU-Net's folders: arguments, and the folders"""
PLACES = {"below a file": "file/folder", "with a name that is too long": "x" * 300, "missing": "nothing/here"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "variable"), [(name, v) for name, (_, needed) in NEEDS.items() for v in needed])
def test_one_line(work, command, capsys, monkeypatch, one_iteration, name, variable, place):
    (work / "file").touch()
    monkeypatch.setenv(variable, str(work / PLACES[place]))
    arguments = NEEDS[name][0] + (one_iteration if name == "mim_pretrain" else [])
    code = command(name, *arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    is_made = (name, variable, place) == ("mim_pretrain", "nnUNet_results", "missing")
    assert (code, len(errors)) == ((0, 0) if is_made else (2, 1))
