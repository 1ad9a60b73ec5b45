"""Which cases a pretraining has seen.

A case is the same by its name or by the hash of its preprocessed voxels, so a renamed copy is found too. It is probably
the same by its fingerprint, which finds copies with other voxels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnunet_mim.checkpoint.fingerprint import FINGERPRINT_SHAPE, copied_from, fingerprints_of_copy, from_text
from nnunet_mim.nnunet.intensities import Intensities

Records = Sequence[Mapping[str, str]]
"""what a checkpoint's provenance holds of each case: {dataset, case, sha256}, some also image_sha256, fingerprint"""


def voxel_sha256(data: np.ndarray) -> str:
    """SHA-256 of a preprocessed case (C, X, Y, Z), however it is stored, in hexadecimal digits.

    Hashed are the shape (as text) and the voxels (C order, little-endian float32).
    """
    voxels = np.ascontiguousarray(data, dtype="<f4")
    digest = hashlib.sha256(repr(tuple(int(n) for n in voxels.shape)).encode())
    digest.update(voxels.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class LeakedCases:
    """Validation cases that an encoder was pretrained on."""

    same: tuple[str, ...] = ()
    """by dataset and identifier, or by voxels under any name"""
    probably_same: Mapping[str, str] = field(default_factory=dict)
    """by fingerprint: identifier → the case that was pretrained on, for reading"""
    not_compared: tuple[str, ...] = ()
    """neither of these, and without a fingerprint"""

    def __bool__(self) -> bool:
        return bool(self.same or self.probably_same)


def leaked_cases(
    provenance: Mapping[str, Any], dataset: str, val_cases: Sequence[str], load_voxels: Callable[[str], np.ndarray],
    intensities: Intensities, spacing: Sequence[float],
) -> LeakedCases:  # fmt: skip
    """Compare validation cases with those that an encoder was pretrained on.

    Args:
        provenance: of the checkpoint; its `cases` are Records.
        dataset: full name of the dataset.
        val_cases: identifiers.
        load_voxels: identifier → (C, X, Y, Z) preprocessed voxels; called only where the name does not decide.
        intensities: of the preprocessed voxels.
        spacing: of the preprocessed voxels, mm per axis.
    """
    seen: Records = provenance.get("cases") or []
    names = {(case["dataset"], case["case"]) for case in seen}
    hashes = {case["sha256"] for case in seen if case.get("sha256")}
    with_fingerprint = any(case.get("fingerprint") for case in seen)
    same, fingerprints = [], {}
    for case in val_cases:
        if (dataset, case) in names:
            same.append(case)
        elif hashes or with_fingerprint:
            voxels = load_voxels(case)
            if voxel_sha256(voxels) in hashes:
                same.append(case)
            elif with_fingerprint:
                fingerprints[case] = fingerprints_of_copy(voxels, intensities, spacing)
    not_compared = tuple(case for case, rows in fingerprints.items() if not rows.any())
    return LeakedCases(tuple(same), probably_same(seen, fingerprints), not_compared)


def probably_same(seen: Records, fingerprints: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Which cases look like one of the records by their `fingerprints_of_copy`, and like which, such as
    `Dataset501_Name case_1`.
    """
    if not fingerprints:
        return {}
    with_fingerprint = [record for record in seen if record.get("fingerprint")]
    known = np.array([from_text(record["fingerprint"]) for record in with_fingerprint], np.int8)
    found = copied_from(np.array(list(fingerprints.values())), known.reshape(-1, *FINGERPRINT_SHAPE))
    records = {case: with_fingerprint[row] for case, row in zip(fingerprints, found.tolist(), strict=True) if row >= 0}
    return {case: f"{record['dataset']} {record['case'] or '(name left out)'}" for case, record in records.items()}


def comparison_note(seen: Records, not_compared: Sequence[str]) -> str:
    """What the search for copies could not compare, in one line; empty where it has compared everything.

    Args:
        seen: records of the checkpoint.
        not_compared: validation cases without a fingerprint.
    """
    if not seen:
        return ""
    unknown = sum(not record.get("fingerprint") for record in seen)
    if unknown == len(seen):
        return "no case of the pretraining has a fingerprint, so only exact copies were looked for"
    parts = [f"{unknown} of the {len(seen)} cases of the pretraining"] if unknown else []
    parts += [f"{len(not_compared)} validation cases ({not_compared[0]} first)"] if not_compared else []
    if not parts:
        return ""
    return f"{' and '.join(parts)} have no fingerprint: of these only exact copies were looked for"


def leak_warning(leaked: LeakedCases, n_val: int, source: str) -> str:
    """The loud warning about validation cases that the encoder of checkpoint `source` was pretrained on."""
    bar, lines = "#" * 100, []
    if leaked.same:
        names = _shortened(leaked.same)
        lines.append(
            f"WARNING: {len(leaked.same)} of {n_val} validation cases of this fold were PRETRAINED ON ({names})."
        )
    if leaked.probably_same:
        pairs = _shortened([f"{case} is probably the same as {seen}" for case, seen in leaked.probably_same.items()])
        lines.append(
            f"WARNING: {len(leaked.probably_same)} of {n_val} validation cases of this fold look like cases that were "
            f"PRETRAINED ON: {pairs}."
        )
    return "\n".join([
        "", bar, *lines,
        f"Their voxels (not their labels) are known to the encoder of {source}.",
        "Validation scores of this fold are optimistic: pretrain with `mim_pretrain -d DATASET -f FOLD` to leave its "
        "validation cases out" + (", and remove their copies from DATASET." if leaked.probably_same else "."),
        bar, "",
    ])  # fmt: skip


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def case_key(record: Mapping[str, str]) -> tuple[str, str, str]:
    """What makes two records the same case: dataset, identifier, hash of the preprocessed voxels."""
    return record["dataset"], record["case"], record["sha256"]


def merged_records(earlier: list[dict[str, str]], now: list[dict[str, str]]) -> list[dict[str, str]]:
    """Union of the case records of two runs, in order; of two values of one case, the later run's counts."""
    merged: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in [*earlier, *now]:
        merged[case_key(record)] = {**merged.get(case_key(record), {}), **record}
    return list(merged.values())
