"""Workers that die, hang, grow or raise cost their own item only."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.system.guarded import Failure, Limits, guarded_map

LIMITS = Limits(seconds=1.5, memory=1 << 30)


def behave(item):
    """What a bad file can do."""
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif item == "exit":
        os._exit(3)
    elif item == "hang":
        time.sleep(600)
    elif item == "grow":
        return len(bytearray(2 << 30))
    elif item == "raise":
        raise ValueError("first line\n  the reason")
    elif item == "stop":
        raise MiMError("the disk is full: free some")
    return item, os.getpid()


def all_of(items, processes, limits=LIMITS):
    with closing(guarded_map(behave, items, processes, limits)) as outcomes:
        return dict(outcomes)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited, and signals have these names, on Linux")
@pytest.mark.parametrize("processes", [1, 3])
def test_every_item_has_an_outcome(processes):
    items = ["a", "crash", "b", "exit", "grow", "hang", "raise", "c"]
    outcomes = all_of(items, processes)
    assert sorted(outcomes) == list(range(8))
    assert outcomes[1] == Failure("its process died of SIGSEGV", needs_memory=True)
    assert outcomes[3] == Failure("its process died of exit code 3", needs_memory=True)
    assert outcomes[4] == Failure("it needs more memory than there is for it", needs_memory=True)
    assert outcomes[5] == Failure("it takes more than 1.5 s")
    assert outcomes[6] == Failure("the reason")
    assert [outcomes[index][0] for index in (0, 2, 7)] == ["a", "b", "c"]
    assert os.getpid() not in [outcomes[index][1] for index in (0, 2, 7)]


def test_a_worker_is_used_again_and_gone_in_the_end():
    outcomes = all_of(list("abcdef"), 1)
    (worker,) = {process for _, process in outcomes.values()}
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_no_items_no_worker():
    assert all_of([], 4) == {}


def test_an_error_for_the_user_ends_it_all():
    with pytest.raises(MiMError, match="the disk is full"):
        all_of(["a", "stop", "hang", "b"], 2)


def test_time_is_counted_for_each_item_alone():
    assert len([outcome for outcome in all_of(["a"] * 5 + ["hang"], 1).values() if isinstance(outcome, Failure)]) == 1


PROGRAM = """
import os, sys, time
from contextlib import closing
from nnunet_mim.errors import exit_code
from nnunet_mim.system.guarded import Limits, guarded_map
def hang(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)
def run():
    with closing(guarded_map(hang, [sys.argv[1]] * 2, 2, Limits(600))) as outcomes:
        list(outcomes)
if __name__ == "__main__":
    sys.exit(exit_code(run))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_no_process_is_left_behind(tmp_path, number, code):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "pids"], stderr=subprocess.PIPE, start_new_session=True
    )
    end = time.monotonic() + 60
    while time.monotonic() < end and len(workers := _lines(tmp_path / "pids")) < 2:
        time.sleep(0.02)
    assert len(workers) == 2
    process.send_signal(number)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == code
    assert "Traceback" not in said
    while time.monotonic() < end and any(map(_runs, workers)):
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def _lines(path):
    return [int(line) for line in path.read_text().split()] if path.is_file() else []


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_script_without_a_guard_is_not_run_by_workers(tmp_path):
    """`if __name__ == "__main__"` is no habit of those who write a few lines around a function of ours."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('run', flush=True)\n"
        "from nnunet_mim.nnunet.image_files import read_headers\n"
        "print(read_headers([__file__], 1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout.split() == ["run", "[None]"], done.stderr
