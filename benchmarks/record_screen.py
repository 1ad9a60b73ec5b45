"""Runs commands in a terminal and writes what was on the screen as Markdown, with the time that each took.

    python benchmarks/record_screen.py PAGE.md 'mim_plan -d 501 -pc tiny-ct' 'nnUNetv2_preprocess -d 501 …'

Folders of nnU-Net's variables, of the environment and the current one are written as the names. Of a bar that
is drawn anew the last state stays. Of a long output the first and last lines stay, LINES in all. Stops at the first
command that fails.
"""

import argparse
import os
import pty
import re
import sys
import time
from pathlib import Path

LINES = 40
WIDTH = 120
FOLDERS = ("VIRTUAL_ENV", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def run(command: str) -> tuple[str, int, float]:
    """What a command writes to a terminal, its exit code, and its seconds."""
    written = []

    def keep(descriptor: int) -> bytes:
        data = os.read(descriptor, 65536)
        written.append(data)
        return data

    start = time.monotonic()
    status = pty.spawn(["bash", "-c", command], keep)
    text = b"".join(written).decode(errors="replace")
    return text, os.waitstatus_to_exitcode(status), time.monotonic() - start


def screen(text: str) -> str:
    """The lines that stay on the screen, without colours and absolute folders."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    for variable in FOLDERS:
        if folder := os.environ.get(variable):
            text = text.replace(folder, f"${variable}")
    text = text.replace(os.getcwd(), ".")
    lines = [line.rsplit("\r", 1)[-1].rstrip()[:WIDTH] for line in text.rstrip().split("\n")]
    if len(lines) > LINES:
        half = LINES // 2
        lines[half:-half] = [f"… {len(lines) - 2 * half} more lines …"]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("commands", nargs="+")
    options = parser.parse_args()
    os.environ["COLUMNS"] = str(WIDTH)
    parts = []
    for command in options.commands:
        text, code, seconds = run(command)
        parts.append(f"{duration(seconds)}:\n\n```console\n$ {command}\n{screen(text)}\n```\n")
        options.page.write_text("\n".join(parts))
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
