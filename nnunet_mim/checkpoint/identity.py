"""Which cases a pretraining has seen.

A case is recognised by its name or by the hash of its preprocessed voxels, so a renamed copy is found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def voxel_sha256(data: np.ndarray) -> str:
    """SHA-256 of a preprocessed case (C, X, Y, Z), however it is stored, in hexadecimal digits.

    Hashed are the shape (as text) and the voxels (C order, little-endian float32).
    """
    voxels = np.ascontiguousarray(data, dtype="<f4")
    digest = hashlib.sha256(repr(tuple(int(n) for n in voxels.shape)).encode())
    digest.update(voxels.data)
    return digest.hexdigest()


def leaked_cases(
    provenance: dict[str, Any], dataset: str, val_cases: Iterable[str], load_voxels: Callable[[str], np.ndarray]
) -> list[str]:
    """Validation cases that an encoder was pretrained on, by dataset and identifier, or by voxels under any name.

    Args:
        provenance: of the checkpoint; its `cases` are records {dataset, case, sha256}.
        dataset: full name of the dataset.
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
    """The loud warning about validation cases that the encoder of checkpoint `source` was pretrained on."""
    bar = "#" * 100
    names = ", ".join(leaked[:10]) + (f" and {len(leaked) - 10} more" if len(leaked) > 10 else "")
    return (
        f"\n{bar}\nWARNING: {len(leaked)} of {n_val} validation cases of this fold were PRETRAINED ON ({names}).\n"
        f"Their voxels (not their labels) are known to the encoder of {source}.\n"
        f"Validation scores of this fold are optimistic: pretrain with `mim_pretrain -d DATASET -f FOLD` to leave its "
        f"validation cases out.\n{bar}\n"
    )


def case_key(record: Mapping[str, str]) -> tuple[str, str, str]:
    """What makes two records the same case: dataset, identifier, hash of the preprocessed voxels."""
    return record["dataset"], record["case"], record["sha256"]


def merged_records(earlier: list[dict[str, str]], now: list[dict[str, str]]) -> list[dict[str, str]]:
    """Union of the case records of two runs, in order; of two values of one case, the later run's counts."""
    merged: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in [*earlier, *now]:
        merged[case_key(record)] = {**merged.get(case_key(record), {}), **record}
    return list(merged.values())
