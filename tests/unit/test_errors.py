"""What a command prints and returns after an error."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from nnunet_mim.errors import INTERRUPTED, REMEDIES, MiMError, exit_code


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("number", sorted(REMEDIES))
def test_an_error_of_the_file_system_is_one_line_that_names_the_file(capsys, number):
    error = OSError(number, os.strerror(number), "/results/fold_0")
    assert exit_code(raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: /results/fold_0: {os.strerror(number)}: {REMEDIES[number]}"


def test_errors_of_this_package_and_success(capsys):
    assert exit_code(raising(MiMError("no plans: run mim_plan -d 5"))) == 2
    assert capsys.readouterr().err == "error: no plans: run mim_plan -d 5\n"
    assert exit_code(lambda: None) == 0


@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ECONNRESET, "reset", "x"), OSError("no file")])
def test_everything_else_is_a_fault_and_is_shown_whole(error):
    with pytest.raises(type(error)):
        exit_code(raising(error))


TERMINATED = """
import signal, sys, time
from nnunet_mim.errors import exit_code
def run():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up")
sys.exit(exit_code(run))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, INTERRUPTED)])
def test_a_command_that_is_ended_cleans_up(number, code):
    command = subprocess.Popen(
        [sys.executable, "-c", TERMINATED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    assert command.stdout.readline() == "begun\n"
    command.send_signal(number)
    said, errors = command.communicate(timeout=30)
    assert (said, command.returncode) == ("cleaned up\n", code)
    assert errors in ("", "interrupted\n")


def test_a_handler_of_somebody_else_is_called_and_kept():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        assert exit_code(lambda: signal.raise_signal(signal.SIGTERM)) == INTERRUPTED
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 2
