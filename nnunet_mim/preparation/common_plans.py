"""One spacing, intensity window and orientation for many datasets: plans without labels, from nnU-Net's planner."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, plan_experiment_dataset
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_mim.errors import MiMError, last_line
from nnunet_mim.nnunet.datasets import raw_files, required_folder
from nnunet_mim.nnunet.documents import read_dataset_json
from nnunet_mim.nnunet.intensities import WIDE_CT_WINDOW
from nnunet_mim.nnunet.orientation import REORIENTING
from nnunet_mim.preparation.mim_plans import make_mim_plans
from nnunet_mim.preparation.prepare_case import CONFIGURATION
from nnunet_mim.system.files import write_atomically

DATASET_JSON, FINGERPRINT, SPLITS = "dataset.json", "dataset_fingerprint.json", "splits_final.json"
PLANNING = {"nnUNet_n_proc_DA": "1"}
"""with 0, which is right for training, nnU-Net's planner fails"""


def fingerprint_of(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], samples: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """A dataset fingerprint like nnU-Net's, made without labels, from spacings (mm) and shapes (voxels) of the cases.

    `samples` are intensities inside the body, per channel; empty where unknown: those of the wide CT window.
    """
    properties = {}
    for channel, values in enumerate(samples):
        statistics: dict[str, Any] = WIDE_CT_WINDOW
        if len(values):
            low, median, high = np.percentile(values, (0.5, 50, 99.5))
            statistics = {
                "mean": np.mean(values), "median": median, "std": np.std(values), "min": np.min(values),
                "max": np.max(values), "percentile_99_5": high, "percentile_00_5": low,
            }  # fmt: skip
        properties[str(channel)] = {name: float(value) for name, value in statistics.items()}
    return {
        "spacings": [list(map(float, s)) for s in spacings],
        "shapes_after_crop": [list(map(int, s)) for s in shapes],
        "foreground_intensity_properties_per_channel": properties,
        "median_relative_size_after_cropping": 1.0,
    }


def logged_fingerprint(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fingerprint of the prepared cases with these entries of the log, by name."""
    channels = zip(*(entry["sample"] for entry in entries.values()), strict=True)
    samples = [[value for case in channel for value in case] for channel in channels]
    return fingerprint_of([e["spacing"] for e in entries.values()], [e["shape"] for e in entries.values()], samples)


def common_plans(
    dataset: str,
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    plans_name: str,
    spacing: Sequence[float],
    preset: str,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """MiM plans at a given spacing for images turned to RAS, and lines that say what was chosen. Writes nothing.

    Patch and batch size are those of nnU-Net's planner at this spacing (mm, array order). `dataset_json` lists cases
    under `dataset`, with absolute paths; the fingerprint is that of the turned images.
    """
    target = [float(s) for s in spacing]
    shapes, spacings = fingerprint["shapes_after_crop"], fingerprint["spacings"]
    shape = np.median([compute_new_shape(n, s, target) for n, s in zip(shapes, spacings, strict=True)], axis=0)
    n_voxels = float(np.prod(shape)) * dataset_json["numTraining"]
    with _temporary_folders(dataset, dataset_json) as preprocessed:
        (preprocessed / FINGERPRINT).write_text(json.dumps(fingerprint))
        try:
            planner = ExperimentPlanner(
                dataset, plans_name=plans_name, overwrite_target_spacing=target, suppress_transpose=True
            )
            configuration = planner.get_plans_for_configuration(
                np.array(target), shape, planner.generate_data_identifier(CONFIGURATION), n_voxels, {}
            )
            reader = planner.determine_reader_writer().__name__
        except (RuntimeError, KeyError, ValueError) as error:
            raise MiMError(f"nnU-Net cannot plan {dataset} ({type(error).__name__}: {error})") from error
    base = {
        "dataset_name": dataset,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": np.median(spacings, axis=0).tolist(),
        "original_median_shape_after_transp": np.median(shapes, axis=0).round().tolist(),
        "image_reader_writer": REORIENTING.get(reader, reader),
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: {**configuration, "batch_dice": False}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": fingerprint["foreground_intensity_properties_per_channel"],
    }
    recursive_fix_for_json_export(base)
    settings = {"spacing": target, **settings}
    return make_mim_plans(
        base, dict(fingerprint), dict(dataset_json), plans_name, CONFIGURATION, preset, settings=settings
    )


def extracted_fingerprint(dataset: str, dataset_json: Mapping[str, Any], processes: int) -> bytes:
    """Content of nnU-Net's own fingerprint file of a labelled dataset, made with this number of processes.

    `dataset_json` lists the cases to read under `dataset`, with absolute paths.
    """
    with _temporary_folders(dataset, dataset_json) as preprocessed:
        try:
            extractor = DatasetFingerprintExtractor(dataset, processes)
            extractor.show_progress_bar = sys.stderr.isatty()
            extractor.run()
            return (preprocessed / FINGERPRINT).read_bytes()
        except Exception as error:
            raise MiMError(
                f"nnU-Net finds no fingerprint of {dataset} ({type(error).__name__}: {error}); its cases are ready"
            ) from error


def write_nnunet_plans(dataset: str, processes: int) -> None:
    """Let nnU-Net check a labelled dataset and write its fingerprint, its dataset.json and `nnUNetPlans`, as
    `nnUNetv2_plan_and_preprocess --no_pp --verify_dataset_integrity` does.
    """
    number = int(dataset[7:10])
    raw, preprocessed = (Path(required_folder(name), dataset) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    dataset_json = read_dataset_json(raw / DATASET_JSON)
    listed = {**dataset_json, "dataset": raw_files(raw, dataset_json)}
    try:
        with _temporary_folders(dataset, listed) as temporary:
            for folder, source in ((temporary.parents[1] / "nnUNet_raw" / dataset, raw), (temporary, preprocessed)):
                if (source / SPLITS).is_file():
                    shutil.copy(source / SPLITS, folder)
            bar = sys.stderr.isatty()
            extract_fingerprint_dataset(
                number, num_processes=processes, check_dataset_integrity=True, verbose=False, show_progress_bar=bar
            )
            plan_experiment_dataset(number)
            written = {path.name: path.read_bytes() for path in temporary.iterdir()}
    except (Exception, SystemExit) as error:
        command = f"nnUNetv2_plan_and_preprocess -d {number} --no_pp --verify_dataset_integrity"
        raise MiMError(
            f"nnU-Net cannot plan {dataset} ({type(error).__name__}: {last_line(error)}): `{command}` says more"
        ) from error
    preprocessed.mkdir(parents=True, exist_ok=True)
    for name, content in {**written, DATASET_JSON: (raw / DATASET_JSON).read_bytes()}.items():
        write_atomically(preprocessed / name, content)


@contextmanager
def _temporary_folders(dataset: str, dataset_json: Mapping[str, Any]) -> Iterator[Path]:
    """Temporary nnU-Net folders in which a dataset has this dataset.json; yields its preprocessed folder.

    nnU-Net's planner and extractor write files, and the user's files must not change yet. Where dataset.json lists no
    paths, nnU-Net forks processes to find them, which can hang in a process with threads.
    """
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(StringIO()):
        raw, preprocessed = (Path(temporary, name, dataset) for name in ("nnUNet_raw", "nnUNet_preprocessed"))
        for folder in (raw, preprocessed):
            folder.mkdir(parents=True)
        (raw / DATASET_JSON).write_text(json.dumps(dataset_json))
        with _environment(nnUNet_raw=str(raw.parent), nnUNet_preprocessed=str(preprocessed.parent), **PLANNING):
            yield preprocessed


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables that hold for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
