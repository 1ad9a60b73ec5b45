"""One progress bar: redrawn on a terminal, lines in a log file."""

import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nnunet_mim
from nnunet_mim.system import progress
from nnunet_mim.system.progress import ProgressBar


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "SHOWN_EVERY_S", 0.05)


def test_a_line_now_and_then_in_a_log_file(often, capsys):
    for number in ProgressBar(range(20), desc="working", unit="case"):
        time.sleep(0.01)
        if number == 10:
            ProgressBar.write("a message")
    out, err = capsys.readouterr()
    assert out == "a message\n"
    assert "\r" not in err
    lines = err.splitlines()
    assert 2 <= len(lines) <= 6
    done = [int(re.match(r"working: .* (\d+)/20 \[", line)[1]) for line in lines]
    assert done == sorted(done)
    assert done[-1] == 20


def test_none_for_what_is_quick(capsys):
    for _ in ProgressBar(range(5), desc="working"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_bar_that_is_updated_by_hand_ends_with_its_last_state(often, capsys):
    with ProgressBar(total=3, desc="working") as bar:
        for _ in range(2):
            time.sleep(0.06)
            bar.update()
    assert "2/3" in capsys.readouterr().err.splitlines()[-1]


def test_redrawn_on_a_terminal():
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    script = "from nnunet_mim.system.progress import ProgressBar\nfor _ in ProgressBar(range(3), ncols=60): pass"
    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, "-c", script], stderr=write):
        pass
    shown = os.read(read, 10_000).decode()
    assert "\r" in shown
    assert "3/3" in shown


def test_no_other_bar_is_used():
    package = Path(nnunet_mim.__file__).parent
    assert [p.name for p in package.rglob("*.py") if "import tqdm" in p.read_text()] == ["progress.py"]
