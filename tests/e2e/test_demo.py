"""`mim_demo`, the real command: every stage of the way on made-up bodies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]


class Tables(HTMLParser):
    """Rows of all tables of a page, as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag in ("td", "th")
        if self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag) -> None:
        self.in_cell = False

    def handle_data(self, data) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def mim_demo(folder: Path, *options: str) -> subprocess.CompletedProcess:
    program = str(Path(sys.executable).with_name("mim_demo"))
    command = [program, "-o", str(folder), "--quick", "-device", "cpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_whole_way(tmp_path) -> None:
    folder = tmp_path / "demo"
    done = mim_demo(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean Dice on 1 unseen bodies" in done.stdout

    state = json.loads((folder / "demo.json").read_text())
    names = ["phantoms", "plan", "mim_plan", "preprocess", "pretrain", "finetune", "predict"]
    assert [stage["name"] for stage in state["stages"]] == names
    assert [log.stem.split("_", 1)[1] for log in sorted((folder / "logs").iterdir())] == names
    for stage in state["stages"]:
        assert stage["command"] in done.stdout
    results = folder / "nnUNet_results" / "Dataset900_Phantoms"
    assert (results / "MiMPretrain__nnUNetMiMPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth").is_file()
    trained = results / "nnUNetTrainerMiM__nnUNetMiMPlans__3d_fullres" / "fold_0"
    assert (trained / "checkpoint_final.pth").is_file()
    assert json.loads((trained / "mim_transfer.json").read_text())["leaked_cases"] == []
    assert [p.name for p in (folder / "predictions").glob("*.nii.gz")] == ["case_0005.nii.gz"]

    text = (folder / "index.html").read_text()
    assert text.count("<img ") == 3
    assert len(re.findall(r"level [123] \d+ mm wide", text)) == 3  # what the pictures of views say of themselves
    rows = {row[0]: row[1:] for row in Tables(text).rows}
    assert rows["Dice"] == ["case_0005", "mean"]
    for organ in ("liver", "spleen", "right kidney", "left kidney", "lungs", "spine", "all organs"):
        assert all(0 <= float(value) <= 1 for value in rows[organ])
    assert float(rows["lungs"][0]) > 0
    for level in ("level 1", "level 2", "level 3"):
        assert 0 < float(rows[level][2]) < 1.3
    assert rows["Pretrain without labels"][0] == "mim_pretrain"

    again = mim_demo(folder)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    assert "not empty" in again.stderr

    (folder / "index.html").unlink()
    resumed = mim_demo(folder, "--continue")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed.stdout.count("done before") == len(names)
    assert (folder / "index.html").is_file()
