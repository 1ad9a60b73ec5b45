"""One `mim_prepare` at a time for a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_mim.errors import MiMError


@contextmanager
def alone(dataset: str) -> Iterator[None]:
    """Hold the lock of a dataset (DatasetXXX_Name). It ends with the process, however that ends.

    Raises:
        MiMError: another process holds it, or the folder cannot be written to.
    """
    path = Path(str(nnUNet_preprocessed), f".mim_prepare_{dataset}.lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise MiMError(f"another mim_prepare is at work on {dataset}: repeat the command when it has ended") from None
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as error:
        raise MiMError(f"cannot write into {path.parent} ({error.strerror}): make it writable") from error
    try:
        yield
    finally:
        lock.release()
