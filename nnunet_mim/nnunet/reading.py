"""Voxels of an image file as nnU-Net's readers turn them.

Nothing here imports PyTorch, so that a worker process that reads one image starts at once.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunet_mim.nnunet.image_files import READ_SECONDS, damaged, file_problem
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory


def read_voxels(path: Path, reader: str) -> tuple[np.ndarray, list[float]] | Failure:
    """Read one image in a guarded worker process.

    Args:
        path: a file that the reader takes.
        reader: name of a reader of nnU-Net, which has been checked.

    Returns:
        voxels (C, Z, Y, X) and the mm between them along z, y, x; or why the file cannot be used.
    """
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    with closing(guarded_map(_read, [(str(path), reader)], 1, limits)) as outcomes:
        ((_, outcome),) = outcomes
    return outcome


def _read(item: tuple[str, str]) -> tuple[np.ndarray, list[float]] | Failure:
    """What `read_voxels` returns. May crash, hang or need much memory."""
    path, reader = item
    if problem := file_problem(path) or damaged(Path(path)):
        return Failure(problem)
    voxels, properties = recursive_find_reader_writer_by_name(reader)().read_images([path])
    if not np.isfinite(voxels).all():
        return Failure("it holds NaN or infinity")
    return voxels, [float(mm) for mm in properties["spacing"]]
