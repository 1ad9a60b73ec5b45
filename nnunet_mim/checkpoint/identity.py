"""Which cases a pretraining has seen, and whether finetuning sees the same units.

A case is recognised by its name or by the hash of its preprocessed voxels, so a renamed copy is found too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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


WINDOW_FIELDS = ("percentile_00_5", "percentile_99_5", "mean", "std")


def leaked_cases(
    provenance: dict[str, Any], dataset: str, val_cases: Iterable[str], load_voxels: Callable[[str], np.ndarray]
) -> list[str]:
    """Validation cases that the encoder was pretrained on.

    A case counts if the same dataset and identifier were pretrained on, or the same voxels under any name.

    Args:
        provenance: of the pretraining checkpoint; its `cases` are {dataset, case, sha256}.
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
    """Text of the loud warning."""
    bar = "#" * 100
    names = ", ".join(leaked[:10]) + (f" and {len(leaked) - 10} more" if len(leaked) > 10 else "")
    return (
        f"\n{bar}\nWARNING: {len(leaked)} of {n_val} validation cases of this fold were PRETRAINED ON ({names}).\n"
        f"Their voxels (not their labels) are known to the encoder of {source}.\n"
        f"Validation scores of this fold are optimistic: pretrain with `mim_pretrain -f FOLD` to leave its validation "
        f"cases out.\n{bar}\n"
    )


def unit_differences(
    provenance: dict[str, Any], config: dict[str, Any], intensity: dict[str, Any], transpose: Sequence[int] = (0, 1, 2)
) -> list[str]:
    """What differs in the preprocessing of pretraining and finetuning.

    Args:
        provenance: of the checkpoint: spacing (mm, array order), normalization (names), intensity_properties (per
            channel, as nnU-Net's plans hold them), transpose_forward (order of axes).
        config: the plans' configuration.
        intensity: the plans' foreground_intensity_properties_per_channel.
        transpose: the plans' transpose_forward.

    Returns:
        One sentence a difference; empty where pretraining and finetuning see the same units.
    """
    differences = []
    spacing = provenance.get("spacing")
    if spacing and not np.allclose(spacing, config["spacing"], rtol=0.02):
        differences.append(f"spacing (mm): pretrained at {_rounded(spacing)}, now {_rounded(config['spacing'])}")
    axes = provenance.get("transpose_forward")
    if axes and list(axes) != list(transpose):
        differences.append(f"order of axes: pretrained with {list(axes)}, now {list(transpose)}")
    schemes = provenance.get("normalization") or []
    for channel, scheme in enumerate(config["normalization_schemes"]):
        if not schemes:
            break
        before = schemes[min(channel, len(schemes) - 1)]
        if before != scheme:
            differences.append(f"channel {channel}: pretrained with {before}, now {scheme}")
        elif scheme == "CTNormalization":
            old = _window(provenance.get("intensity_properties") or {}, min(channel, len(schemes) - 1))
            new = _window(intensity, channel)
            if old and not np.allclose(old, new, rtol=1e-3, atol=1e-3):
                differences.append(f"channel {channel}: pretrained on {_describe(old)}, now {_describe(new)}")
    return differences


def units_warning(differences: list[str]) -> str:
    """Text of the warning about different preprocessing."""
    return (
        "WARNING: pretraining and finetuning do not see the same units, which costs some of the benefit: "
        + "; ".join(differences)
        + ". Plans of `mim_plan -pc CHECKPOINT` keep them equal."
    )


def _window(intensity: dict[str, Any], channel: int) -> list[float]:
    properties = intensity.get(str(channel))
    return [float(properties[name]) for name in WINDOW_FIELDS] if properties else []


def _describe(window: list[float]) -> str:
    return f"CT window {window[0]:g}…{window[1]:g} HU (mean {window[2]:g}, std {window[3]:g})"


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(v), 3) for v in values]


def case_key(record: Mapping[str, str]) -> tuple[str, str, str]:
    """What makes two records the same case: dataset, identifier, hash of the preprocessed voxels."""
    return record["dataset"], record["case"], record["sha256"]


def merged_records(earlier: list[dict[str, str]], now: list[dict[str, str]]) -> list[dict[str, str]]:
    """Union of two lists of records, in order: an earlier run's cases are remembered, and what it knew of them."""
    merged: dict[tuple[str, str, str], dict[str, str]] = {}
    for record in [*earlier, *now]:
        merged[case_key(record)] = {**merged.get(case_key(record), {}), **record}
    return list(merged.values())
