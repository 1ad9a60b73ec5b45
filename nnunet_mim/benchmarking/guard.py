"""No evaluation on cases that the pretraining has seen: found by name, preprocessed voxels and image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.matrix import Matrix
from nnunet_mim.checkpoint.format import read_safely
from nnunet_mim.checkpoint.identity import leaked_cases, voxel_sha256
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import Grid, RawImage, preprocess
from nnunet_mim.nnunet.datasets import raw_images
from nnunet_mim.system.files import write_atomically

CACHE = "seen.json"
VERSION = 2
"""of what is looked at; other versions of the file do not count"""
READER = "SimpleITKIOWithReorient"
"""nnU-Net's reader where a checkpoint does not say; `mim_prepare` uses it too"""


@dataclass(frozen=True)
class Findings:
    """Of one arm on the validation cases of one dataset and fold."""

    seen: tuple[str, ...] = ()
    """validation cases that the pretraining has seen"""
    unknown: str = ""
    """why that is not known, or not known for sure"""


Seen = dict[tuple[str, int, str], Findings]
"""by (dataset, fold, arm)"""


def look_for_seen_cases(matrix: Matrix) -> Seen:
    """Compare the validation cases with the records in every arm's checkpoint. What was found is kept in a file, so
    that only new arms, datasets and folds take time (some seconds a case).

    A case is seen if the same dataset and identifier, the same preprocessed voxels, or the same image were pretrained
    on: a new name, another file format or compression, and another spacing or intensity window of the plans do not hide
    it. An image that was resampled, cropped or (where the pretraining's plans keep the orientation of files) turned
    before is another image.
    """
    file = matrix.bench.output / CACHE
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    found: Seen = {}
    changed = False
    for place, cell in matrix.cells.items():
        here = (place.dataset, place.fold, place.arm)
        if here in found:
            continue
        if not cell.arm.checkpoint:
            found[here] = Findings()
            continue
        key = hashlib.sha256(
            json.dumps([VERSION, here, cell.val_cases, cell.arm.identity], sort_keys=True).encode()
        ).hexdigest()
        if key in known:
            found[here] = Findings(tuple(known[key]))
            continue
        found[here] = seen_cases(provenance_of(Path(cell.arm.checkpoint)), cell.arm, cell.val_cases)
        if not found[here].unknown:  # else more may be known the next time
            known[key], changed = list(found[here].seen), True
    if changed:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(known).encode())
    return found


def refuse_seen_cases(seen: Seen) -> None:
    """Raise MiMError if any arm's pretraining has seen a validation case."""
    leaks = [(place, findings.seen) for place, findings in seen.items() if findings.seen]
    if leaks:
        (dataset, fold, arm), cases = leaks[0]
        more = f" (and {len(leaks) - 1} other combinations)" if len(leaks) > 1 else ""
        raise MiMError(
            f"the pretraining of arm {arm} has seen {len(cases)} of the validation cases of {dataset} fold {fold}, "
            f"{cases[0]} first{more}: pretrain without them (-f {fold}), evaluate on other cases, or give "
            "--allow-seen, which marks them in every table"
        )


def provenance_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says about where its weights come from; None where it is not one of `mim_pretrain`."""
    try:
        stored = read_safely(checkpoint)
    except MiMError:
        if checkpoint.is_dir():
            raise
        return None  # a format of somebody else's: what it was trained on is not known then
    return stored.get("provenance") if isinstance(stored, dict) else None


def seen_cases(provenance: Mapping[str, Any] | None, arm: Arm, val_cases: tuple[str, ...]) -> Findings:
    """Which of an arm's validation cases are in the records of a pretraining."""
    records = (provenance or {}).get("cases") or []
    if not provenance or not records:
        return Findings(unknown="the checkpoint does not say which cases it was trained on")
    source = arm.source
    cases = source.dataset_class(str(source.folder), list(val_cases))
    seen = set(
        leaked_cases(dict(provenance), source.dataset, val_cases, lambda name: np.asarray(cases.load_case(name)[0][:]))
    )
    hashes = {record["sha256"] for record in records}
    images = {record["image_sha256"] for record in records if record.get("image_sha256")}
    files = raw_images(source.dataset)
    missing = [case for case in val_cases if case not in seen and case not in files]
    reader = recursive_find_reader_writer_by_name(provenance.get("image_reader_writer") or READER)()
    for case in val_cases:
        if case not in seen and case in files:
            voxels, properties = reader.read_images(files[case])
            image = RawImage(case, voxels, Grid(np.zeros(3), np.diag([float(s) for s in properties["spacing"]])))
            if voxel_sha256(voxels) in images or voxel_sha256(preprocess(image, provenance)[0]) in hashes:
                seen.add(case)
    if missing:
        why = f"{len(missing)} images are not in nnUNet_raw ({missing[0]} first), their preprocessed voxels are new"
        return Findings(tuple(sorted(seen)), why)
    return Findings(tuple(sorted(seen)))
