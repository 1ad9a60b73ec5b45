"""Content hash of a preprocessed case: how pretraining and finetuning recognise the same voxels under any name."""

from __future__ import annotations

import hashlib

import numpy as np


def voxel_sha256(data: np.ndarray) -> str:
    """Hash shape and voxels of a preprocessed case.

    Args:
        data: (C, X, Y, Z), any array that converts to float32. Storage (`.b2nd`, `.npz`, file name) does not matter.

    Returns:
        64 hexadecimal digits: SHA-256 over the shape (as text) and the C-order little-endian float32 bytes.
    """
    voxels = np.ascontiguousarray(data, dtype="<f4")
    digest = hashlib.sha256(repr(tuple(int(n) for n in voxels.shape)).encode())
    digest.update(voxels.data)
    return digest.hexdigest()
