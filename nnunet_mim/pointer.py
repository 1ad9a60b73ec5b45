"""How a dataset finds the checkpoint of a pretraining on several datasets, which lies with the first one's results."""

from __future__ import annotations

import json
import os
from pathlib import Path

from nnunet_mim.files import write_atomically

POINTER = "checkpoint_final.json"


def write_pointer(folder: Path, checkpoint: Path) -> None:
    """Leave a file in a run folder of another dataset that names the checkpoint, relative to itself."""
    folder.mkdir(parents=True, exist_ok=True)
    relative = Path(os.path.relpath(checkpoint, folder)).as_posix()
    write_atomically(folder / POINTER, json.dumps({"checkpoint": relative}).encode())


def read_pointer(folder: Path) -> Path | None:
    """The checkpoint that a run folder points at; None where there is no pointer or no such file any more."""
    try:
        path = folder / json.loads((folder / POINTER).read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(os.path.normpath(path)) if path.is_file() else None
