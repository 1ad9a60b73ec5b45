"""No evaluation on cases that the pretraining has seen: found by name, preprocessed voxels, image and fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from pydantic import TypeAdapter, ValidationError

from nnunet_mim.benchmarking.cell import Arm
from nnunet_mim.benchmarking.external import ExternalSet
from nnunet_mim.benchmarking.matrix import Matrix
from nnunet_mim.checkpoint.fingerprint import fingerprints_of_copy
from nnunet_mim.checkpoint.format import read_safely
from nnunet_mim.checkpoint.identity import LeakedCases, comparison_note, leaked_cases, probably_same, voxel_sha256
from nnunet_mim.checkpoint.metadata import check_provenance
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.errors import MiMError
from nnunet_mim.inspection.ct import preprocess
from nnunet_mim.nnunet.components import check_name
from nnunet_mim.nnunet.datasets import raw_images
from nnunet_mim.nnunet.image_files import READ_SECONDS, READER, damaged, file_problem
from nnunet_mim.nnunet.raw_image import Grid, RawImage
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.guarded import Failure, Limits, guarded_map, share_of_memory
from nnunet_mim.system.machine import physical_memory
from nnunet_mim.system.untrusted import read_json

VERSION = 4
"""version of the comparison; what other versions have found does not count"""
IMAGE_KEYS = {"configuration", "spacing", "normalization", "intensity_properties"}
"""what a checkpoint says of the images that it was trained on, where they can be prepared anew"""


@dataclass(frozen=True)
class Findings:
    """Cases, on which one arm, dataset and fold is evaluated, that the pretraining has seen."""

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


FINDINGS = TypeAdapter(dict[str, Findings])
Seen = dict[tuple[str, int, str], Findings]
"""by (dataset, fold, arm)"""


def look_for_seen_cases(matrix: Matrix, test: ExternalSet | None = None) -> Seen:
    """Compare the validation cases, or those of a test set, with the records in every arm's checkpoint. The findings
    are kept in a file.

    A case is seen if the same dataset and identifier, the same preprocessed voxels, or the same image were pretrained
    on: a new name, another file format or compression, and another spacing or intensity window of the plans do not hide
    it. An image that was resampled, mirrored, turned or slightly cropped before is found by its fingerprint, as
    probably the same.
    """
    file = matrix.bench.output / "seen.json"
    try:
        kept = FINDINGS.validate_python(read_json(file))
    except (MiMError, ValidationError):  # it is made anew
        kept = {}
    found: Seen = {}
    before = dict(kept)
    for here, cell in {(place.dataset, place.fold, place.arm): cell for place, cell in matrix.cells.items()}.items():
        if not cell.arm.checkpoint:
            found[here] = Findings()
            continue
        compared = [test.dataset, *test.images] if test else cell.val_cases
        content = json.dumps([VERSION, here, compared, cell.arm.identity], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        if key in kept:
            found[here] = kept[key]
            continue
        provenance = provenance_of(Path(cell.arm.checkpoint))
        found[here] = seen_tests(provenance, test) if test else seen_cases(provenance, cell.arm, cell.val_cases)
        if not found[here].unknown:  # otherwise more may be known the next time
            kept[key] = found[here]
    if kept != before:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({key: asdict(findings) for key, findings in kept.items()}).encode())
    return found


def refuse_seen_cases(seen: Seen, test: str = "") -> None:
    """MiMError if any arm's pretraining has seen a validation case, or one of the dataset `test`."""
    leaks = [(here, findings.seen) for here, findings in seen.items() if findings.seen]
    if leaks:
        (dataset, fold, arm), cases = leaks[0]
        others = f" (and {len(leaks) - 1} other combinations)" if len(leaks) > 1 else ""
        likely = seen[dataset, fold, arm].sentence()
        where = f"cases of {test}" if test else f"validation cases of {dataset} fold {fold}"
        seen_here = f"{len(cases)} of the {where}, {cases[0]} first{others}"
        seen_here += f" ({likely})" if likely else ""
        without = "" if test else f" (mim_pretrain with -f {fold})"
        remedy = f"pretrain without them{without}, evaluate on other cases, or mark them in tables (--allow-seen)"
        raise MiMError(f"the pretraining of arm {arm} has seen {seen_here}: {remedy}")


def provenance_of(checkpoint: Path) -> dict[str, Any] | None:
    """Where a checkpoint says that its weights come from; None where it is not one of `mim_pretrain`.

    Raises MiMError where it says what cannot be.
    """
    try:
        stored = read_safely(checkpoint)
    except MiMError:
        if checkpoint.is_dir():
            raise
        return None  # a format of somebody else's: what it was trained on is not known then
    provenance = stored.get("provenance") if isinstance(stored, dict) else None
    if provenance:
        check_provenance(provenance, str(checkpoint))
    return provenance


def seen_cases(provenance: Mapping[str, Any] | None, arm: Arm, val_cases: tuple[str, ...]) -> Findings:
    """Which of an arm's validation cases are in the records of a pretraining."""
    if not provenance or not provenance.get("cases"):
        return Findings(unknown="the checkpoint does not say which cases it was trained on")
    source = arm.source
    cases = source.dataset_class(str(source.folder), list(val_cases))

    def load(case: str) -> np.ndarray:
        return np.asarray(cases.load_case(case)[0][:])

    leaked = leaked_cases(provenance, source.dataset, val_cases, load, source.intensities, source.spacing)
    return _with_images(provenance, leaked, val_cases, raw_images(source.dataset))


def seen_tests(provenance: Mapping[str, Any] | None, test: ExternalSet) -> Findings:
    """Which cases of a test set are in the records of a pretraining. Only their images are compared."""
    if not provenance or not (records := provenance.get("cases") or []):
        return Findings(unknown="the checkpoint does not say which cases it was trained on")
    named = {(record["dataset"], record["case"]) for record in records}
    same = tuple(case for case in test.images if (test.dataset, case) in named)
    files = {case: [str(path) for path in channels] for case, channels in test.images.items()}
    rest = tuple(case for case in test.images if case not in same)
    return _with_images(provenance, LeakedCases(same, {}, rest), tuple(test.images), files)


def _with_images(
    provenance: Mapping[str, Any], leaked: LeakedCases, cases: Sequence[str], files: Mapping[str, list[str]]
) -> Findings:
    """The findings for `cases` once their images, by case in `files`, are compared with the records of a pretraining,
    where names and preprocessed voxels (`leaked`) do not decide.
    """
    records = provenance["cases"]
    seen, fingerprints = set(leaked.same), {}
    hashes = {record["sha256"] for record in records}
    image_hashes = {record.get("image_sha256") for record in records}
    undecided = [case for case in cases if case not in seen]
    missing = [case for case in undecided if case not in files]
    named = provenance.get("image_reader_writer") or READER
    _reader(named)
    units = {key: value for key, value in provenance.items() if key not in ("cases", "loss_history")}
    unread = {}
    todo = sorted(set(undecided) - set(missing)) if units.keys() >= IMAGE_KEYS else []
    items = [(case, files[case], named, units, case in leaked.not_compared) for case in todo]
    limits = Limits(READ_SECONDS, share_of_memory(physical_memory(), 1))
    with closing(guarded_map(_identity_of, items, 1, limits)) as outcomes:
        for index, outcome in outcomes:
            case = todo[index]
            if isinstance(outcome, Failure):
                unread[case] = outcome.reason
            elif outcome[0] in image_hashes or outcome[1] in hashes:
                seen.add(case)
            elif outcome[2] is not None:
                fingerprints[case] = outcome[2]
    unknown = []
    if missing:
        what = f"{len(missing)} images are not in nnUNet_raw ({missing[0]} first)"
        unknown = [f"{what}, their preprocessed voxels are new"]
    if unread:
        first = min(unread)
        reason = f"{first} first, {unread[first]}"
        unknown += [f"{len(unread)} images cannot be read ({reason}), their preprocessed voxels are new"]
    if not units.keys() >= IMAGE_KEYS:
        unknown += ["the checkpoint does not say how to prepare images for it"]
    likely = {**leaked.probably_same, **probably_same(records, fingerprints)}
    likely = {case: other for case, other in sorted(likely.items()) if case not in seen}
    compared = {case for case, rows in fingerprints.items() if rows.any()}
    note = comparison_note(records, [case for case in leaked.not_compared if case not in seen | compared])
    return Findings(tuple(sorted(seen)), "; ".join(unknown), likely, note)


def _identity_of(
    item: tuple[str, Sequence[str], str, Mapping[str, Any], bool]
) -> tuple[str, str, np.ndarray | None] | Failure:
    """Hash of an image, and hash and `fingerprints_of_copy` of it as a pretraining would have prepared it.

    Args:
        item: name of the case, its files, nnU-Net's reader, provenance of the checkpoint without its cases, and whether
            the fingerprints are wanted. For guarded workers.
    """
    case, files, reader, provenance, with_fingerprint = item
    for file in files:
        if problem := file_problem(file) or damaged(Path(file)):
            return Failure(problem)
    voxels, properties = _reader(reader).read_images(files)
    image = RawImage(case, voxels, Grid(np.zeros(3), np.diag([float(s) for s in properties["spacing"]])))
    try:
        prepared = preprocess(image, provenance)[0]
    except MiMError as error:
        return Failure(str(error))
    hashes = voxel_sha256(voxels), voxel_sha256(prepared)
    if not with_fingerprint:
        return *hashes, None
    return *hashes, fingerprints_of_copy(prepared, Units.of(provenance), provenance["spacing"])


def _reader(name: str) -> BaseReaderWriter:
    """nnU-Net's reader of this name. Raises MiMError where there is none."""
    check_name("image_reader_writer of a checkpoint", "image reader", str(name), "take another copy of it")
    return recursive_find_reader_writer_by_name(name)()
