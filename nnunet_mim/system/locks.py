"""Locks that let one process at a time do a piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnunet_mim.errors import MiMError


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file. The lock ends with the process, however that ends; the empty file may stay.

    On a file system without locks a note is printed instead.

    Args:
        path: lock file; its folder is made.
        busy: message of the error if another process holds the lock.

    Raises:
        MiMError: another process holds the lock, or the file cannot be written.
    """
    lock = FileLock(path, mode=0o666)  # colleagues may hold it later
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise MiMError(busy) from None
    except NotImplementedError:
        print(f"note: {path.parent} is on a file system without locks: do not start the same command twice")
    except OSError as error:
        raise MiMError(f"cannot write {path} ({error.strerror}): make it writable, or delete it") from error
    try:
        yield
    finally:
        lock.release()
