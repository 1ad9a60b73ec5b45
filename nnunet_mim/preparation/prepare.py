"""`mim_prepare`, from folders of CT or nnU-Net datasets to preprocessed cases that `mim_pretrain` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.image_files import file_problem, read_headers
from nnunet_mim.nnunet.labels import write_reference
from nnunet_mim.nnunet.plans import voxels_key
from nnunet_mim.nnunet.source import Source
from nnunet_mim.preparation.case_log import UNREADABLE, CaseLog, Entry, earlier_names, incomplete_series, input_key
from nnunet_mim.preparation.cluster import run_shares
from nnunet_mim.preparation.common_plans import (
    DATASET_JSON,
    FINGERPRINT,
    common_plans,
    extracted_fingerprint,
    fingerprint_of,
    logged_fingerprint,
)
from nnunet_mim.preparation.finding import Volume, find_volumes
from nnunet_mim.preparation.mim_plans import check_can_write, same_voxels
from nnunet_mim.preparation.prepare_case import CONFIGURATION, ENDINGS, Job, RawCase, file_stamps, run_jobs
from nnunet_mim.preparation.raw_cases import read_raw_dataset, unlabelled_dataset
from nnunet_mim.preparation.screening import Header, read_header
from nnunet_mim.pretraining.data.case_index import CaseInfo, write_index
from nnunet_mim.system.files import write_atomically
from nnunet_mim.system.progress import ProgressBar
from nnunet_mim.system.untrusted import read_json

SEGMENTATION = "_seg"
"""what the names of nnU-Net's preprocessed segmentations end in"""
TRIED_AGAIN = (*UNREADABLE, "label", "fewer than")
"""how reasons begin that can vanish while the files stay as they are"""


@dataclass(frozen=True)
class PrepareConfig:
    """How to prepare."""

    spacing: tuple[float, float, float] = (1.5, 1.5, 1.5)
    """mm, array order (z, y, x)"""
    plans_name: str = "nnUNetMiMPlans"
    preset: str | None = None
    """network size in the plans; None: that of existing plans, else mim_pretrain's default"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings of the plans, as in mim_plan --set"""
    processes: int = 1
    min_slices: int = 16
    """minimum number of voxels along every axis of an image"""
    overwrite: bool = False
    """whether to begin anew where cases were prepared with another spacing or window"""
    slurm: Mapping[str, Any] | None = None
    """parameters of submitit and the number of jobs, to prepare cases in jobs of SLURM; None: on this machine"""


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset."""

    source: Source
    log: CaseLog
    labelled: bool
    notes: list[str]
    """how the plans were made"""
    unread: Mapping[str, str]
    """cases that are kept as they were prepared although their images cannot be read now, and why, by name"""

    def doubts(self) -> list[list[str]]:
        """Case, file, and what is doubtful about a case that is used all the same: a row for each warning."""
        rows = []
        for name, entry in self.log.prepared.items():
            warnings = [f"{self.unread[name]}: kept as it was prepared"] if name in self.unread else []
            rows += [[name, entry["files"][0], warning] for warning in (*warnings, *entry.get("warnings", ()))]
        return rows

    def failures(self) -> list[str]:
        """File and reason of every case that was left out, or whose image cannot be read now."""
        reasons = {name: entry["reason"] for name, entry in self.log.skipped.items()} | dict(self.unread)
        return [f"{self.log.entries[name]['files'][0]}: {reason}" for name, reason in reasons.items()]


@dataclass(frozen=True)
class _Survey:
    """A dataset whose headers have been read. Nothing is written yet."""

    dataset: str
    base: Path
    """its folder in nnUNet_preprocessed"""
    log: CaseLog
    cases: Sequence[RawCase]
    headers: Mapping[str, Header]
    """headers of the usable cases, by name"""
    problems: Mapping[str, str]
    """reasons against the other cases, by name"""
    label_values: tuple[int, ...]
    """that may occur in labels; empty for a dataset without"""
    config: PrepareConfig

    @property
    def plans_file(self) -> Path:
        return self.base / f"{self.config.plans_name}.json"

    @property
    def labelled(self) -> bool:
        return len(self.label_values) > 0


def prepare_folders(dataset: str, folders: Sequence[Path], config: PrepareConfig) -> Prepared:
    """Make an nnU-Net dataset (DatasetXXX_Name) without labels from all CT in some folders, and preprocess it.

    Cases of earlier calls for the same dataset are kept. Image files stay where they are; DICOM series, which nnU-Net
    cannot read, are written into `imagesTr`. Raises MiMError where nothing is usable or the dataset is another's.
    """
    raw, base = Path(str(nnUNet_raw), dataset), Path(str(nnUNet_preprocessed), dataset)
    earlier = _earlier_dataset(raw)
    volumes, cases = find_volumes(folders, earlier_names(base / "mim_prepare"), config.processes), []
    for volume in incomplete_series(volumes, _log(base, config).prepared):
        copy = str(raw / "imagesTr" / f"{volume.name}_0000.nii.gz")
        cases.append(RawCase(volume.name, (copy,) if volume.series else volume.files, found=volume))
    survey = _survey(dataset, base, cases, (), config)
    images = {name: entry["images"] for name, entry in earlier.items()}
    images |= {case.name: list(case.images) for case in cases if case.name in survey.headers}
    dataset_json = unlabelled_dataset(images)
    plans, notes, same = _plan(survey, dataset_json)

    (raw / "imagesTr").mkdir(parents=True, exist_ok=True)
    if not earlier:
        _write_json(raw / DATASET_JSON, unlabelled_dataset({}))
    prepared = _prepare(survey, plans, notes, same, dataset_json)
    _drop_duplicates(prepared.log, prepared.source.folder)
    entries, skipped = prepared.log.prepared, prepared.log.skipped
    images = {name: files for name, files in images.items() if name in earlier and name not in skipped}
    images |= {name: entry["images"] for name, entry in entries.items()}
    for case in cases:  # series that turned out to be of no use
        if case.series is not None and case.name not in images:
            Path(case.images[0]).unlink(missing_ok=True)
    for folder in (raw, base):
        _write_json(folder / DATASET_JSON, unlabelled_dataset(images))
    _write_json(base / FINGERPRINT, logged_fingerprint(entries))
    return _indexed(prepared)


def prepare_dataset(dataset: str, config: PrepareConfig) -> Prepared:
    """Preprocess an existing nnU-Net dataset, with labels or without, with the same plans as all others.

    Raises MiMError for no raw data, files that are missing, or an output folder that holds something else.
    """
    base = Path(str(nnUNet_preprocessed), dataset)
    raw = read_raw_dataset(Path(str(nnUNet_raw), dataset), base)
    dataset_json = raw.description
    survey = _survey(dataset, base, raw.cases, raw.label_values, config)
    if not survey.headers:
        raise MiMError(
            f"none of {len(raw.cases)} images can be used ({_first_reasons(survey.problems)}): bring them back and "
            f"repeat the command; {len(survey.log.prepared)} cases of {dataset} are prepared and are kept"
        )
    first = next(case for case in raw.cases if case.name in survey.headers)
    example = {"images": list(first.images), "label": first.label or ""}
    plans, notes, same = _plan(survey, {**dataset_json, "dataset": {first.name: example}})
    base.mkdir(parents=True, exist_ok=True)
    _write_json(base / DATASET_JSON, dataset_json)
    prepared = _prepare(survey, plans, notes, same, dataset_json)
    entries = {name: entry for name, entry in prepared.log.prepared.items() if name not in prepared.unread}
    if survey.labelled:
        _write_references([case for case in raw.cases if case.name in entries], base, dataset_json["file_ending"])
    if not survey.labelled:
        _write_json(base / FINGERPRINT, logged_fingerprint(prepared.log.prepared))
    elif not (base / FINGERPRINT).is_file():
        # nnU-Net's trainer copies it, and its planner would take one made without labels for its own
        dataset_json = {
            **dataset_json,
            "dataset": {name: entry for name, entry in raw.files.items() if name in entries},
        }
        write_atomically(base / FINGERPRINT, extracted_fingerprint(dataset, dataset_json, config.processes))
    return _indexed(prepared)


def _earlier_dataset(raw: Path) -> dict[str, Any]:
    """Cases that `mim_prepare -i` has listed in dataset.json before. Raises MiMError for any other dataset."""
    if not raw.is_dir() or not any(path.name != "imagesTr" or any(path.iterdir()) for path in raw.iterdir()):
        return {}
    content = read_dataset_json(raw / DATASET_JSON) if (raw / DATASET_JSON).is_file() else {}
    if content.get("made_by") != "mim_prepare" or "dataset" not in content:
        raise MiMError(f"{raw} holds a dataset that -i has not made: prepare it without -i, or take another -d")
    return content["dataset"]


def _survey(
    dataset: str, base: Path, cases: Sequence[RawCase], label_values: tuple[int, ...], config: PrepareConfig
) -> _Survey:
    """Read the headers that have not been yet. Raises MiMError where no case can be used, now or from earlier calls."""
    log = _log(base, config)
    unread = [case.images[0] for case in cases if case.found is None]
    read = dict(zip(unread, read_headers(unread, config.processes, f"looking at {dataset}"), strict=True))
    volumes = [case.found or Volume(case.name, case.images[:1], header=read[case.images[0]] or "") for case in cases]
    found = {
        case.name: _name_problem(case) or read_header(volume, config.min_slices)
        for case, volume in zip(cases, volumes, strict=True)
    }
    headers = {name: result for name, result in found.items() if isinstance(result, Header)}
    problems = {name: result for name, result in found.items() if isinstance(result, str)}
    if not headers and not log.prepared:
        reasons = _first_reasons(problems)
        raise MiMError(f"none of {len(cases)} images can be used ({reasons}): give CT volumes in Hounsfield units")
    return _Survey(dataset, base, log, cases, headers, problems, label_values, config)


def _log(base: Path, config: PrepareConfig) -> CaseLog:
    return CaseLog(base / "mim_prepare" / f"{config.plans_name}_{CONFIGURATION}.jsonl")


def _name_problem(case: RawCase) -> str | None:
    """Why a case cannot be used, as far as the names of its files tell, or None."""
    if case.name.endswith(SEGMENTATION):
        return f"its name ends in {SEGMENTATION} (nnU-Net takes such files for segmentations): rename the image"
    if case.found is not None:
        return None
    files = (*case.images, *((case.label,) if case.label is not None else ()))
    return next((problem for file in files if (problem := file_problem(file))), None)


def _first_reasons(problems: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {problem}" for name, problem in list(problems.items())[:3])


def _plan(survey: _Survey, dataset_json: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], bool]:
    """Plans, how they were made, and whether existing cases were made with them. Writes nothing.

    Raises MiMError where other plans would delete prepared cases whose images cannot be read now.
    """
    config = survey.config
    sizes = {name: (entry["spacing"], entry["shape"]) for name, entry in survey.log.prepared.items()}
    sizes |= {name: (header.spacing, header.size) for name, header in survey.headers.items()}
    spacings, shapes = zip(*(sizes[name] for name in sorted(sizes)), strict=True)
    channels = max(len(case.images) for case in survey.cases)
    plans, notes = common_plans(
        survey.dataset, dataset_json, fingerprint_of(spacings, shapes, [()] * channels), config.plans_name,
        config.spacing, config.preset or PretrainConfig().preset, config.settings,
    )  # fmt: skip
    same = check_can_write(plans, survey.plans_file, config.overwrite, "-p")
    folder = survey.base / plans["configurations"][CONFIGURATION]["data_identifier"]
    lost = [name for name, problem in survey.problems.items() if _is_kept(survey.log, name, folder, problem)]
    if lost and not same:
        raise MiMError(
            f"--overwrite would delete {len(lost)} prepared cases that cannot be prepared anew, such as {lost[0]} "
            f"({survey.problems[lost[0]]}): bring their images back, or choose another name with -p"
        )
    if not config.settings and config.preset is None and same_voxels(plans, survey.plans_file):
        return read_json(survey.plans_file), ["the plans that are there already"], same
    return plans, notes, same


def _prepare(
    survey: _Survey, plans: dict[str, Any], notes: list[str], same: bool, dataset_json: Mapping[str, Any]
) -> Prepared:
    """Preprocess every case that has not been yet. Raises MiMError where no case is left."""
    chosen, log = plans["configurations"][CONFIGURATION], survey.log
    folder = survey.base / chosen["data_identifier"]
    if folder.is_dir() and not same:
        shutil.rmtree(folder)
        log.clear()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(survey.plans_file, json.dumps(plans, indent=4).encode())
    source = Source(
        survey.dataset, survey.config.plans_name, CONFIGURATION, folder, nnUNetDatasetBlosc2, (),
        tuple(chosen["spacing"]), tuple(chosen["normalization_schemes"]),
        plans["foreground_intensity_properties_per_channel"], plans,
    )  # fmt: skip
    unread = {}
    for case in survey.cases:
        if problem := survey.problems.get(case.name):
            if _is_kept(log, case.name, folder, problem):
                unread[case.name] = problem
            elif log.entries.get(case.name, {}).get("reason") != problem:
                _leave_out(log, folder, _entry(case, "", {"problem": problem}))
    unread |= _prepare_usable(survey, source, dataset_json)
    if not log.prepared:
        reasons = _first_reasons({name: entry["reason"] for name, entry in log.skipped.items()})
        raise MiMError(f"no case of {survey.dataset} could be prepared ({reasons}): give CT in Hounsfield units")
    return Prepared(source, log, survey.labelled, notes, unread)


def _prepare_usable(survey: _Survey, source: Source, dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Preprocess the cases whose headers are sound, unless that is done. Returns those of `Prepared.unread`."""
    log, folder, min_slices, unread = survey.log, source.folder, survey.config.min_slices, {}
    processes = survey.config.processes
    usable = {case.name: case for case in survey.cases if case.name in survey.headers}
    keys = {name: input_key(case.inputs, voxels_key(source.plans, CONFIGURATION)) for name, case in usable.items()}
    must_be_ct = not survey.labelled and source.intensities.is_ct()
    todo = [name for name, case in usable.items() if not _is_done(log, case, keys[name], folder, min_slices)]
    while todo:
        jobs = [
            Job(
                usable[name], source, dataset_json, must_be_ct, min_slices, survey.label_values,
                survey.headers[name].warnings, keys[name],
            )
            for name in todo
        ]  # fmt: skip
        slurm, shares = survey.config.slurm, log.path.with_suffix(".slurm")
        results = run_jobs(jobs, processes) if slurm is None else run_shares(jobs, processes, slurm, shares)
        progress = ProgressBar(
            results, total=len(usable), initial=len(usable) - len(jobs),
            desc=f"preparing {survey.dataset}", unit="case",
        )  # fmt: skip
        for name, result in progress:
            entry = _entry(usable[name], keys[name], result)
            if "reason" not in entry:
                log.add(entry)
            elif _is_kept(log, name, folder, entry["reason"]):
                unread[name] = entry["reason"]
            else:
                _leave_out(log, folder, entry)
        duplicates = [name for name in usable if "same_as" in log.entries[name]]  # of images that may have changed
        todo = [name for name in duplicates if not _is_done(log, usable[name], keys[name], folder, min_slices)]
    return unread


def _is_done(log: CaseLog, case: RawCase, key: str, folder: Path, min_slices: int) -> bool:
    """Whether nothing has changed since a case was prepared, or left out for good."""
    entry = log.entries.get(case.name)
    if entry is None or entry["key"] != key:
        return False
    if "same_as" in entry:
        return log.prepared.get(entry["same_as"], {}).get("image_sha256") == entry["image_sha256"]
    if "reason" in entry:
        return not entry["reason"].startswith(TRIED_AGAIN)
    if case.label is not None and "warnings" not in entry:  # of a version that did not check labels
        return False
    return min(entry["info"]["shape"]) >= min_slices and entry["stamps"] == file_stamps(folder, case.name)


def _is_kept(log: CaseLog, case: str, folder: Path, problem: str) -> bool:
    """Whether a case stays as it was prepared, as its image is only unreadable now: a disk may be away."""
    entry = log.prepared.get(case)
    return problem.startswith(UNREADABLE) and entry is not None and entry["stamps"] == file_stamps(folder, case)


def _leave_out(log: CaseLog, folder: Path, entry: Entry) -> None:
    """Remove the preprocessed files of a case, then log why."""
    for ending in reversed(ENDINGS):
        (folder / f"{entry['case']}{ending}").unlink(missing_ok=True)
    log.add(entry)


def _drop_duplicates(log: CaseLog, folder: Path) -> None:
    """Of cases with the same voxels keep the one that was prepared first."""
    same = defaultdict(list)
    for name, entry in log.entries.items():  # in the order of the log
        if "reason" not in entry:
            same[entry["image_sha256"]].append(name)
    for kept, *others in same.values():
        for name in others:
            wanted = ("case", "key", "files", "images", "slices", "image_sha256")
            entry = {k: value for k, value in log.entries[name].items() if k in wanted}
            reason = f"a duplicate (the same image as {kept})"
            _leave_out(log, folder, {**entry, "reason": reason, "same_as": kept})


def _write_references(cases: Sequence[RawCase], base: Path, ending: str) -> None:
    """Write labels to where nnU-Net's validation looks for them, as its preprocessing does."""
    folder = base / "gt_segmentations"
    folder.mkdir(exist_ok=True)
    for case in cases:
        if case.label is not None:
            write_reference(Path(case.label), Path(case.images[0]), folder / f"{case.name}{ending}")


def _entry(case: RawCase, key: str, result: Mapping[str, Any]) -> Entry:
    found = {"reason": result["problem"]} if "problem" in result else dict(result)
    slices = {} if case.series is None else {"slices": [os.path.basename(file) for file in case.series.files]}
    files = {"files": list(case.inputs[:1]), "images": list(case.images), **slices}
    return {"case": case.name, "key": key, **files, **found}


def _indexed(prepared: Prepared) -> Prepared:
    """With its cases, whose index is written so that opening a run reads no voxels."""
    entries = prepared.log.prepared.values()
    infos = [CaseInfo(**entry["info"] | {"image_sha256": entry["image_sha256"]}) for entry in entries]
    source = replace(prepared.source, cases=tuple(info.case for info in infos))
    write_index(source, infos)
    return replace(prepared, source=source)


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2).encode())
