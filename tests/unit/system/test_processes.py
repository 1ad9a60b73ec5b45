"""Processes that end with the one that started them."""

import os
import subprocess
import sys
import time

import pytest

PROGRAM = """
import multiprocessing, sys, time
from nnunet_mim.system.processes import end_with_parent
if __name__ == "__main__":
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    end_with_parent(int(sys.argv[1]))
    time.sleep(float(sys.argv[2]))
    print("lived", flush=True)
    worker.kill()
"""


@pytest.mark.parametrize(("parent", "lives"), [(os.getpid, True), (lambda: 1_000_000_000, False)])
def test_a_process_whose_parent_is_gone_ends_with_its_workers(parent, lives):
    """Also where the parent was gone before the process looked for it: it is named."""
    command = [sys.executable, "-c", PROGRAM, str(parent()), "1.5" if lives else "60"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=30)
    worker, *rest = done.stdout.split()
    assert rest == (["lived"] if lives else [])
    assert done.returncode == (0 if lives else 1)
    end = time.monotonic() + 5
    while _runs(int(worker)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(int(worker))


def test_a_module_ends_with_the_process_that_is_named(tmp_path):
    """`python -m nnunet_mim.system.child` runs a module, which ends when the named process is killed."""
    (tmp_path / "slow.py").write_text(
        "import sys, time\nif __name__ == '__main__':\n    print(sys.argv[1:], flush=True)\n    time.sleep(60)\n"
    )
    parent = "import os, subprocess, sys; subprocess.run([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]])"
    command = [sys.executable, "-c", parent, sys.executable, "-m", "nnunet_mim.system.child", "slow", "a", "--b"]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=tmp_path)
    assert starter.stdout.readline() == "['a', '--b']\n"
    starter.kill()
    assert starter.stdout.read() == "", "it would wait here for a process that still runs"
    assert starter.wait() < 0


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
