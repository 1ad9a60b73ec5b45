"""One process at a time, also where there are no locks."""

import subprocess
import sys

import pytest

from nnunet_mim.errors import MiMError
from nnunet_mim.system import locks as lock
from nnunet_mim.system.locks import exclusive_lock

HOLD_AND_DIE = """
import os, pathlib, sys
from nnunet_mim.system.locks import exclusive_lock
with exclusive_lock(pathlib.Path(sys.argv[1]), "busy"):
    os._exit(9)  # without any clean-up
"""


def test_a_second_holder_is_refused_and_the_lock_ends(tmp_path):
    path = tmp_path / "new" / "x.lock"
    with exclusive_lock(path, "busy"), pytest.raises(MiMError, match="busy"), exclusive_lock(path, "busy"):
        pass
    with exclusive_lock(path, "busy"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, str(tmp_path / "x.lock")])
    assert done.returncode == 9
    with exclusive_lock(tmp_path / "x.lock", "busy"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    class NoLock:
        def __init__(self, *_, **__):
            pass

        def acquire(self, timeout):
            raise NotImplementedError

        def release(self):
            pass

    monkeypatch.setattr(lock, "FileLock", NoLock)
    with exclusive_lock(tmp_path / "x.lock", "busy"):
        pass
    assert "on a file system without locks: do not start the same command twice" in capsys.readouterr().out
