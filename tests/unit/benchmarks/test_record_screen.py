"""What stays of a screen on a page."""

import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "benchmarks" / "record_screen.py"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def recorded(page, *commands, **variables):
    return subprocess.run([sys.executable, FILE, page, *commands], capture_output=True, cwd=page.parent, env=variables)


def test_a_bar_keeps_its_last_state_and_folders_become_variables(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "elsewhere"
    bar = r"printf '\033[32m 1/2\r 2/2\033[0m\n'"
    done = recorded(page, f"{bar}; echo $nnUNet_results/a $PWD/b", PATH="/usr/bin:/bin", nnUNet_results=str(results))
    assert done.returncode == 0
    text = page.read_text()
    assert text.startswith("0 s:\n\n```console\n$ printf ")
    assert text.endswith("\n 2/2\n$nnUNet_results/a ./b\n```\n")


def test_the_middle_of_a_long_output_is_left_out_and_a_failure_ends_it(tmp_path):
    page = tmp_path / "page.md"
    done = recorded(page, "seq 100", "echo no; exit 3", "echo never", PATH="/usr/bin:/bin")
    assert done.returncode == 3
    lines = page.read_text().splitlines()
    assert lines[3:25] == ["$ seq 100", *map(str, range(1, 21)), "… 60 more lines …"]
    assert lines[25:45] == list(map(str, range(81, 101)))
    assert "no" in lines
    assert "never" not in lines
