"""Which cases a pretraining has seen.

A case is recognised by its name or by the hash of its preprocessed voxels, so a renamed copy is found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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


def leaked_cases(
    provenance: dict[str, Any], dataset: str, val_cases: Iterable[str], load_voxels: Callable[[str], np.ndarray]
) -> list[str]:
    """Validation cases that the encoder was pretrained on: the same dataset and identifier, or the same voxels under
    any name.

    Args:
        provenance: of the pretraining checkpoint; its `cases` are records {dataset, case, sha256}.
        dataset: e.g. Dataset501_HeadNeckOAR.
        val_cases: identifiers.
        load_voxels: identifier → (C, X, Y, Z) preprocessed voxels; called only where the name does not decide.
    """
    seen = provenance.get("cases") or []
    names = {(case["dataset"], case["case"]) for case in seen}
    hashes = {case["sha256"] for case in seen if case.get("sha256")}
    return [
        case
        for case in val_cases
        if (dataset, case) in names or (bool(hashes) and voxel_sha256(load_voxels(case)) in hashes)
    ]


def leak_warning(leaked: list[str], n_val: int, source: str) -> str:
    """The loud warning about validation cases that were pretrained on.

    Args:
        leaked: their identifiers.
        n_val: number of validation cases.
        source: path of the checkpoint.
    """
    bar = "#" * 100
    names = ", ".join(leaked[:10]) + (f" and {len(leaked) - 10} more" if len(leaked) > 10 else "")
    return (
        f"\n{bar}\nWARNING: {len(leaked)} of {n_val} validation cases of this fold were PRETRAINED ON ({names}).\n"
        f"Their voxels (not their labels) are known to the encoder of {source}.\n"
        f"Validation scores of this fold are optimistic: pretrain with `mim_pretrain -f FOLD` to leave its validation "
        f"cases out.\n{bar}\n"
    )


def case_key(record: Mapping[str, str]) -> tuple[str, str, str]:
    """What makes two records the same case: dataset, identifier, hash of the preprocessed voxels."""
    return record["dataset"], record["case"], record["sha256"]


def merged_records(earlier: list[dict[str, str]], now: list[dict[str, str]]) -> list[dict[str, str]]:
    """Union of the case records of an earlier run and of this one, in order. Of two records of one case, this run's
    values count; a value that only the earlier one has stays.
    """
    merged: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in [*earlier, *now]:
        merged[case_key(record)] = {**merged.get(case_key(record), {}), **record}
    return list(merged.values())
