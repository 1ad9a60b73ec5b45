"""No evaluation on cases that the pretraining has seen: found by name, preprocessed voxels, image and fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.matrix import Matrix
from nnunet_mim.checkpoint.fingerprint import fingerprint
from nnunet_mim.checkpoint.format import read_safely
from nnunet_mim.checkpoint.identity import comparison_note, leaked_cases, probably_same, voxel_sha256
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.inspection.ct import Grid, RawImage, preprocess
from nnunet_mim.nnunet.datasets import raw_images
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.untrusted import read_json

VERSION = 3
"""version of the comparison; what other versions have found does not count"""
READER = "SimpleITKIOWithReorient"
"""nnU-Net's reader where a checkpoint does not name one; `mim_prepare` uses it too"""


@dataclass(frozen=True)
class Findings:
    """Validation cases of one arm, dataset and fold that the pretraining has seen."""

    same: tuple[str, ...] = ()
    """the same name, voxels or image"""
    unknown: str = ""
    """why the seen cases are not known, or not for sure"""
    probably_same: Mapping[str, str] = field(default_factory=dict)
    """by fingerprint: case → the case that was pretrained on"""
    note: str = ""
    """what had no fingerprint to compare"""

    @property
    def seen(self) -> tuple[str, ...]:
        """All of them, in the order of their names."""
        return tuple(sorted([*self.same, *self.probably_same]))

    def sentence(self) -> str:
        """Which cases are probably the same as which; empty where there are none."""
        pairs = [f"{case} is probably the same as {other}" for case, other in self.probably_same.items()]
        return "; ".join(pairs[:5]) + (" …" if len(pairs) > 5 else "")


Seen = dict[tuple[str, int, str], Findings]
"""by (dataset, fold, arm)"""


def look_for_seen_cases(matrix: Matrix) -> Seen:
    """Compare the validation cases with the records in every arm's checkpoint. The findings are kept in a file.

    A case is seen if the same dataset and identifier, the same preprocessed voxels, or the same image were pretrained
    on: a new name, another file format or compression, and another spacing or intensity window of the plans do not hide
    it. An image that was resampled, mirrored, turned or slightly cropped before is found by its fingerprint, as
    probably the same.
    """
    file = matrix.bench.output / "seen.json"
    try:
        kept = read_json(file)
    except MiMError:
        kept = {}
    found: Seen = {}
    before = dict(kept)
    for here, cell in {(place.dataset, place.fold, place.arm): cell for place, cell in matrix.cells.items()}.items():
        if not cell.arm.checkpoint:
            found[here] = Findings()
            continue
        content = json.dumps([VERSION, here, cell.val_cases, cell.arm.identity], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key in kept:
            found[here] = Findings(**{**kept[key], "same": tuple(kept[key]["same"])})
            continue
        found[here] = seen_cases(provenance_of(Path(cell.arm.checkpoint)), cell.arm, cell.val_cases)
        if not found[here].unknown:  # otherwise more may be known the next time
            kept[key] = asdict(found[here])
    if kept != before:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(kept).encode())
    return found


def refuse_seen_cases(seen: Seen) -> None:
    """MiMError if any arm's pretraining has seen a validation case."""
    leaks = [(here, findings.seen) for here, findings in seen.items() if findings.seen]
    if leaks:
        (dataset, fold, arm), cases = leaks[0]
        others = f" (and {len(leaks) - 1} other combinations)" if len(leaks) > 1 else ""
        likely = seen[dataset, fold, arm].sentence()
        seen_here = f"{len(cases)} of the validation cases of {dataset} fold {fold}, {cases[0]} first{others}"
        seen_here += f" ({likely})" if likely else ""
        remedy = f"pretrain without them (-f {fold}), evaluate on other cases, or mark them in tables (--allow-seen)"
        raise MiMError(f"the pretraining of arm {arm} has seen {seen_here}: {remedy}")


def provenance_of(checkpoint: Path) -> dict[str, Any] | None:
    """Where a checkpoint says that its weights come from; None where it is not one of `mim_pretrain`."""
    try:
        stored = read_safely(checkpoint)
    except MiMError:
        if checkpoint.is_dir():
            raise
        return None  # a format of somebody else's: what it was trained on is not known then
    return stored.get("provenance") if isinstance(stored, dict) else None


def seen_cases(provenance: Mapping[str, Any] | None, arm: Arm, val_cases: tuple[str, ...]) -> Findings:
    """Which of an arm's validation cases are in the records of a pretraining."""
    if not provenance or not (records := provenance.get("cases") or []):
        return Findings(unknown="the checkpoint does not say which cases it was trained on")
    source = arm.source
    cases = source.dataset_class(str(source.folder), list(val_cases))

    def load(case: str) -> np.ndarray:
        return np.asarray(cases.load_case(case)[0][:])

    leaked = leaked_cases(provenance, source.dataset, val_cases, load, source.intensities, source.spacing)
    seen, fingerprints = set(leaked.same), {}
    hashes = {record["sha256"] for record in records}
    image_hashes = {record.get("image_sha256") for record in records}
    files = raw_images(source.dataset)
    undecided = [case for case in val_cases if case not in seen]
    missing = [case for case in undecided if case not in files]
    reader = _reader(provenance.get("image_reader_writer") or READER)
    for case in sorted(set(undecided) - set(missing)):
        voxels, properties = reader.read_images(files[case])
        image = RawImage(case, voxels, Grid(np.zeros(3), np.diag([float(s) for s in properties["spacing"]])))
        prepared = preprocess(image, provenance)[0]
        if voxel_sha256(voxels) in image_hashes or voxel_sha256(prepared) in hashes:
            seen.add(case)
        elif case in leaked.not_compared:
            fingerprints[case] = fingerprint(prepared, Units.of(provenance), provenance["spacing"])
    unknown = ""
    if missing:
        unknown = f"{len(missing)} images are not in nnUNet_raw ({missing[0]} first), their preprocessed voxels are new"
    likely = {**leaked.probably_same, **probably_same(records, fingerprints)}
    likely = {case: other for case, other in sorted(likely.items()) if case not in seen}
    compared = {case for case, rows in fingerprints.items() if rows.any()}
    note = comparison_note(records, [case for case in leaked.not_compared if case not in seen | compared])
    return Findings(tuple(sorted(seen)), unknown, likely, note)


def _reader(name: str) -> BaseReaderWriter:
    """nnU-Net's reader of this name. Raises MiMError where there is none."""
    try:
        found = recursive_find_reader_writer_by_name(str(name))
    except RuntimeError:
        found = None
    if not (isinstance(found, type) and issubclass(found, BaseReaderWriter)):
        raise MiMError(f"nnU-Net has no reader {printable(name)}, which a checkpoint names: take another copy of it")
    return found()
