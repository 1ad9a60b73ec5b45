"""One process at a time for a piece of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnunet_mim.errors import MiMError


@contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file. The lock ends with the process, however that ends; the empty file may stay. Where the file
    system has no locks there is a note instead.

    Args:
        path: of the lock file, its folder is made.
        busy: the error where another process holds it.

    Raises:
        MiMError: another process holds it, or the file cannot be written.
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
