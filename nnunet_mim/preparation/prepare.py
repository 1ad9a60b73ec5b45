"""`mim_prepare`, from folders of CT or nnU-Net datasets to preprocessed cases that `mim_pretrain` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from tqdm import tqdm

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.datasets import raw_files
from nnunet_mim.nnunet.source import Source
from nnunet_mim.preparation.case_log import CaseLog, Entry, input_key, known_names
from nnunet_mim.preparation.common_plans import (
    CONFIGURATION,
    DATASET_JSON,
    FINGERPRINT,
    common_plans,
    extracted_fingerprint,
    fingerprint_of,
)
from nnunet_mim.preparation.finding import Volume, beside, find_volumes
from nnunet_mim.preparation.mim_plans import check_can_write, voxels_key, write_plans
from nnunet_mim.preparation.prepare_case import ENDINGS, Job, file_stamps
from nnunet_mim.preparation.screening import Header, read_header
from nnunet_mim.preparation.workers import run_jobs
from nnunet_mim.pretraining.data.case_index import body_threshold, info_from_json, write_index
from nnunet_mim.system.files import write_atomically

MADE_BY = {"made_by": "mim_prepare"}
"""in dataset.json: the dataset may be rewritten by a later call"""


@dataclass(frozen=True)
class PrepareConfig:
    """How to prepare."""

    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    """mm, array order (z, y, x)"""
    plans_name: str = "nnUNetMiMPlans"
    preset: str | None = None
    """network size in the plans; None: that of plans which are there already, else mim_pretrain's default"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """for the plans, as in mim_plan --set"""
    processes: int = 1
    min_slices: int = 16
    """least voxels along every axis of an image"""
    overwrite: bool = False
    """begin anew where cases were prepared with another spacing or window"""


@dataclass(frozen=True)
class Case:
    """One case of a dataset to prepare."""

    name: str
    images: tuple[str, ...]
    """a file a channel, as nnU-Net reads them"""
    label: str | None = None
    series: Volume | None = None
    """what the image has to be made from first"""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files of the user that decide the result."""
        images = self.images if self.series is None else self.series.files
        more = () if self.label is None else (self.label,)
        return (*images, *more, *(file for image in images for file in beside(image)))

    @property
    def volume(self) -> Volume:
        return self.series or Volume(self.name, self.images[:1])


@dataclass(frozen=True)
class Prepared:
    """What has been done."""

    source: Source
    log: CaseLog
    labelled: bool
    notes: list[str]
    """how the plans were made"""


@dataclass(frozen=True)
class _Work:
    """A dataset, before anything is written."""

    dataset: str
    raw: Path
    base: Path
    log: CaseLog
    cases: Sequence[Case]
    headers: Mapping[str, Header]
    """of those cases that can be used, by name"""
    problems: Mapping[str, str]
    """of the others"""
    labelled: bool
    config: PrepareConfig


def prepare_folders(dataset: str, folders: Sequence[Path], config: PrepareConfig) -> Prepared:
    """Make an nnU-Net dataset without labels from all CT in some folders, and preprocess it.

    Cases of earlier calls for the same dataset are kept. Image files stay where they are; DICOM series, which nnU-Net
    cannot read, are written into `imagesTr`.

    Args:
        dataset: DatasetXXX_Name.
        folders: searched to any depth.
        config: how.

    Raises:
        MiMError: nothing usable, or the dataset holds something else.
    """
    raw, base = Path(str(nnUNet_raw), dataset), Path(str(nnUNet_preprocessed), dataset)
    earlier = _earlier_dataset(raw)
    volumes = find_volumes(folders, known_names(base / "mim_prepare"))
    copies = {v.name: str(raw / "imagesTr" / f"{v.name}_0000.nii.gz") for v in volumes if v.series}
    cases = [Case(v.name, (copies[v.name],), None, v) if v.series else Case(v.name, v.files) for v in volumes]
    work = _look(dataset, raw, base, cases, False, config)
    images = {name: entry["images"] for name, entry in earlier.items()}
    images |= {case.name: list(case.images) for case in cases if case.name in work.headers}
    dataset_json = unlabelled_dataset(images)
    plans, notes, same = _plan(work, dataset_json)

    (raw / "imagesTr").mkdir(parents=True, exist_ok=True)
    if not earlier:
        _write_json(raw / DATASET_JSON, unlabelled_dataset({}))
    prepared = _prepare(work, plans, notes, same, dataset_json)
    drop_duplicates(work.log, prepared.source.folder)
    entries = work.log.prepared
    _require_any(prepared)
    others = {name: files for name, files in images.items() if name in earlier and name not in work.log.skipped}
    final = unlabelled_dataset({**others, **{name: entry["images"] for name, entry in entries.items()}})
    for case in cases:  # series that turned out to be of no use
        if case.series is not None and case.name not in final["dataset"]:
            Path(case.images[0]).unlink(missing_ok=True)
    _write_json(raw / DATASET_JSON, final)
    _write_json(base / DATASET_JSON, final)
    _write_json(base / FINGERPRINT, _final_fingerprint(entries))
    return _indexed(prepared)


def prepare_dataset(dataset: str, config: PrepareConfig) -> Prepared:
    """Preprocess an existing nnU-Net dataset, with labels or without, with the same plans as all others.

    Raises:
        MiMError: no raw data, labels for some cases only, or the output folder holds something else.
    """
    raw, base = Path(str(nnUNet_raw), dataset), Path(str(nnUNet_preprocessed), dataset)
    if not (raw / DATASET_JSON).is_file():
        raise MiMError(f"{raw / DATASET_JSON} does not exist: give the number of a dataset in nnUNet_raw, or -i FOLDER")
    dataset_json = _read_json(raw / DATASET_JSON)
    files = raw_files(raw, dataset_json)
    have = {name: os.path.isfile(entry["label"]) for name, entry in files.items()}
    labelled = any(have.values())
    if labelled and not all(have.values()):
        missing = next(name for name, is_there in have.items() if not is_there)
        raise MiMError(f"{files[missing]['label']} is missing, others are there: add it, or move its image away")
    cases = [
        Case(str(name), tuple(map(str, entry["images"])), str(entry["label"]) if labelled else None)
        for name, entry in sorted(files.items())
    ]
    if not cases:
        raise MiMError(f"no image in {raw}: see nnU-Net's page on its dataset format")
    work = _look(dataset, raw, base, cases, labelled, config)
    first = next(case for case in cases if case.name in work.headers)
    example = {"images": list(first.images), "label": first.label or ""}
    plans, notes, same = _plan(work, {**dataset_json, "dataset": {first.name: example}})
    base.mkdir(parents=True, exist_ok=True)
    _write_json(base / DATASET_JSON, dataset_json)
    if labelled:
        copy_labels(cases, base / "gt_segmentations", dataset_json["file_ending"])
    prepared = _prepare(work, plans, notes, same, dataset_json)
    _require_any(prepared)
    if labelled and not (base / FINGERPRINT).is_file():
        # nnU-Net's trainer copies it, and its planner would take one made without labels for its own
        sound = {name: entry for name, entry in files.items() if name in work.log.prepared}
        write_atomically(
            base / FINGERPRINT, extracted_fingerprint(dataset, {**dataset_json, "dataset": sound}, config.processes)
        )
    elif not labelled:
        _write_json(base / FINGERPRINT, _final_fingerprint(work.log.prepared))
    return _indexed(prepared)


def _earlier_dataset(raw: Path) -> dict[str, Any]:
    """Cases that `mim_prepare -i` has listed in dataset.json before. MiMError where the dataset is somebody else's."""
    if not raw.is_dir() or not any(path.name != "imagesTr" or any(path.iterdir()) for path in raw.iterdir()):
        return {}
    content = _read_json(raw / DATASET_JSON) if (raw / DATASET_JSON).is_file() else {}
    if not content.items() >= MADE_BY.items():
        raise MiMError(f"{raw} holds a dataset that -i has not made: prepare it without -i, or take another -d")
    return content["dataset"]


def _look(dataset: str, raw: Path, base: Path, cases: Sequence[Case], labelled: bool, config: PrepareConfig) -> _Work:
    """Read all headers."""
    log = CaseLog(base / "mim_prepare" / f"{config.plans_name}_{CONFIGURATION}.jsonl")
    with ThreadPoolExecutor(8) as pool:
        looked = pool.map(lambda case: read_header(case.volume, config.min_slices), cases)
        found = list(tqdm(looked, total=len(cases), desc=f"looking at {dataset}", unit="image"))
    pairs = [(case.name, header) for case, header in zip(cases, found, strict=True)]
    headers = {name: header for name, header in pairs if isinstance(header, Header)}
    problems = {name: header for name, header in pairs if isinstance(header, str)}
    if not headers and not log.prepared:
        reasons = "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:3])
        raise MiMError(f"none of {len(cases)} images can be used ({reasons}): give CT volumes in Hounsfield units")
    return _Work(dataset, raw, base, log, cases, headers, problems, labelled, config)


def _plan(work: _Work, dataset_json: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Plans, how they were made, and whether the cases that are there were made with them. Writes nothing."""
    config, plans_file = work.config, work.base / f"{work.config.plans_name}.json"
    sizes = {name: (entry["spacing"], entry["shape"]) for name, entry in work.log.prepared.items()}
    sizes |= {name: (header.spacing, header.size) for name, header in work.headers.items()}
    spacings, shapes = zip(*(sizes[name] for name in sorted(sizes)), strict=True)
    channels = max(len(case.images) for case in work.cases)
    plans, notes = common_plans(
        work.dataset, dataset_json, fingerprint_of(spacings, shapes, [()] * channels), config.plans_name,
        config.spacing, config.preset or PretrainConfig().preset, config.settings,
    )  # fmt: skip
    same = check_can_write(plans, plans_file, config.overwrite, "-p")
    if same and not config.settings and config.preset is None:
        return _read_json(plans_file), ["the plans that are there already"], True
    return plans, notes, same


def _prepare(
    work: _Work, plans: dict[str, Any], notes: list[str], same: bool, dataset_json: Mapping[str, Any]
) -> Prepared:
    """Preprocess every case that has not been yet."""
    chosen, log = plans["configurations"][CONFIGURATION], work.log
    folder = work.base / chosen["data_identifier"]
    if folder.is_dir() and not same:
        shutil.rmtree(folder)
        log.clear()
    folder.mkdir(parents=True, exist_ok=True)
    write_plans(plans, work.base / f"{work.config.plans_name}.json")
    source = Source(
        work.dataset, work.config.plans_name, CONFIGURATION, folder, nnUNetDatasetBlosc2, (), tuple(chosen["spacing"]),
        tuple(chosen["normalization_schemes"]), plans["foreground_intensity_properties_per_channel"], plans,
    )  # fmt: skip
    for case in work.cases:
        if (problem := work.problems.get(case.name)) and log.entries.get(case.name, {}).get("reason") != problem:
            _leave_out(log, folder, case.name, _entry(case, "", {"problem": problem}))
    decides = voxels_key(plans, CONFIGURATION)
    usable = {case.name: case for case in work.cases if case.name in work.headers}
    keys = {name: input_key(case.inputs, decides) for name, case in usable.items()}
    must_be_ct = not work.labelled and source.intensities.is_ct()
    todo = [name for name in usable if not _done(log, name, keys[name], folder)]
    while todo:
        jobs = [
            Job(
                name, usable[name].images, usable[name].label, usable[name].series, str(folder), plans, CONFIGURATION,
                dataset_json, must_be_ct, body_threshold(source),
            )
            for name in todo
        ]  # fmt: skip
        progress = tqdm(
            run_jobs(jobs, work.config.processes), total=len(usable), initial=len(usable) - len(jobs),
            desc=f"preparing {work.dataset}", unit="case",
        )  # fmt: skip
        for name, result in progress:
            entry = _entry(usable[name], keys[name], result)
            if "reason" in entry:
                _leave_out(log, folder, name, entry)
            else:
                log.add(entry)
        duplicates = [name for name in usable if "same_as" in log.entries[name]]  # of images that have changed now
        todo = [name for name in duplicates if not _done(log, name, keys[name], folder)]
    return Prepared(source, log, work.labelled, notes)


def _done(log: CaseLog, case: str, key: str, folder: Path) -> bool:
    """Whether nothing has changed since a case was prepared, or left out for good."""
    entry = log.entries.get(case)
    if entry is None or entry["key"] != key:
        return False
    if "same_as" in entry:
        return log.prepared.get(entry["same_as"], {}).get("image_sha256") == entry["image_sha256"]
    if "reason" in entry:
        return not entry["reason"].startswith("cannot be")  # the disk may be back now
    return entry["stamps"] == file_stamps(folder, case)


def _leave_out(log: CaseLog, folder: Path, case: str, entry: Entry) -> None:
    """Take the files of a case away, then note why."""
    for ending in reversed(ENDINGS):
        (folder / f"{case}{ending}").unlink(missing_ok=True)
    log.add(entry)


def drop_duplicates(log: CaseLog, folder: Path) -> None:
    """Of cases with the same voxels keep the one that was prepared first."""
    same = defaultdict(list)
    for name, entry in log.entries.items():  # in the order of the log
        if "reason" not in entry:
            same[entry["image_sha256"]].append(name)
    for kept, *others in same.values():
        for name in others:
            entry = {k: log.entries[name][k] for k in ("case", "key", "files", "images", "image_sha256")}
            reason = f"a duplicate (the same image as {kept})"
            _leave_out(log, folder, name, {**entry, "reason": reason, "same_as": kept})


def copy_labels(cases: Sequence[Case], folder: Path, ending: str) -> None:
    """Copy labels to where nnU-Net's validation looks for them, as its preprocessing does."""
    folder.mkdir(exist_ok=True)
    for case in cases:
        target = folder / f"{case.name}{ending}"
        if case.label and not (target.is_file() and target.stat().st_mtime >= os.stat(case.label).st_mtime):
            write_atomically(target, Path(case.label).read_bytes())


def unlabelled_dataset(images: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """nnU-Net's dataset.json of CT without labels; its label files are named, but need not exist."""
    return {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0},
        "numTraining": len(images),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIOWithReorient",
        **MADE_BY,
        "dataset": {
            name: {"images": list(files), "label": f"labelsTr/{name}.nii.gz"} for name, files in sorted(images.items())
        },
    }


def _entry(case: Case, key: str, result: Mapping[str, Any]) -> Entry:
    found = {"reason": result["problem"]} if "problem" in result else dict(result)
    return {"case": case.name, "key": key, "files": list(case.inputs[:1]), "images": list(case.images), **found}


def _require_any(prepared: Prepared) -> None:
    if not prepared.log.prepared:
        reasons = "; ".join(f"{e['case']}: {e['reason']}" for e in list(prepared.log.skipped.values())[:3])
        raise MiMError(
            f"no case of {prepared.source.dataset} could be prepared ({reasons}): give CT volumes in Hounsfield units"
        )


def _final_fingerprint(entries: Mapping[str, Entry]) -> dict[str, Any]:
    channels = zip(*(entry["sample"] for entry in entries.values()), strict=True)
    samples = [[value for case in channel for value in case] for channel in channels]
    return fingerprint_of([e["spacing"] for e in entries.values()], [e["shape"] for e in entries.values()], samples)


def _indexed(prepared: Prepared) -> Prepared:
    """With the index of its cases written, so that opening a run reads no voxels."""
    infos = [info_from_json(entry["info"], entry["image_sha256"]) for entry in prepared.log.prepared.values()]
    source = replace(prepared.source, cases=tuple(info.case for info in infos))
    write_index(source, infos)
    return replace(prepared, source=source)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MiMError(f"cannot read {path} ({error}): correct or restore it") from error


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode())
