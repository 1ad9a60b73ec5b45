"""Files that appear whole or not at all, and tables for them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

FORMULA = ("=", "+", "-", "@", "\t")
"""beginnings of a cell that a spreadsheet takes for a formula"""


@contextmanager
def atomic_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` once the block has ended without an error.

    `path` holds either the former content or all of the new one, also after a crash or a loss of power.

    Args:
        path: to write.
        temporary: where the content is written first, in the same folder. Default: a name that no other process uses.

    Raises:
        OSError: the disk is full or not writable; the former file is left as it was.
    """
    temporary = temporary or path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):  # the new name shall last over a loss of power, where the file system can do that
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either the former content or all of the new one. Raises OSError."""
    with atomic_file(path) as file:
        file.write(content)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV that a spreadsheet computes nothing of: a text that it would take for a formula begins with '."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_without_formula(cell) for cell in row] for row in rows)
    return text.getvalue()


def _without_formula(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r", "\\r")  # Python's csv would write it as it is, and a reader begin a row there
    if not cell.startswith(FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
