"""One spacing, intensity window and orientation for many datasets: plans without labels, from nnU-Net's planner."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_mim.errors import MiMError
from nnunet_mim.preparation.mim_plans import REORIENTING, WIDE_CT_WINDOW, make_mim_plans

CONFIGURATION = "3d_fullres"
DATASET_JSON, FINGERPRINT = "dataset.json", "dataset_fingerprint.json"


def fingerprint_of(
    spacings: Sequence[Sequence[float]], shapes: Sequence[Sequence[int]], samples: Sequence[Sequence[float]] = ((),)
) -> dict[str, Any]:
    """A dataset fingerprint as nnU-Net's, made without labels.

    Args:
        spacings: mm, array order, per case.
        shapes: voxels per case.
        samples: intensities inside the body, per channel; an empty one where they are not known yet.
    """
    properties = {}
    for channel, values in enumerate(samples):
        stated: dict[str, Any] = dict(WIDE_CT_WINDOW)
        if len(values):
            low, median, high = np.percentile(values, (0.5, 50, 99.5))
            stated = {
                "mean": np.mean(values), "median": median, "std": np.std(values), "min": np.min(values),
                "max": np.max(values), "percentile_99_5": high, "percentile_00_5": low,
            }  # fmt: skip
        properties[str(channel)] = {name: float(value) for name, value in stated.items()}
    return {
        "spacings": [list(map(float, s)) for s in spacings],
        "shapes_after_crop": [list(map(int, s)) for s in shapes],
        "foreground_intensity_properties_per_channel": properties,
        "median_relative_size_after_cropping": 1.0,
    }


def common_plans(
    dataset: str, dataset_json: Mapping[str, Any], fingerprint: Mapping[str, Any], plans_name: str,
    spacing: Sequence[float], preset: str, settings: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """MiM plans at a given spacing in the images' own order of axes, read in RAS orientation. Nothing is written.

    Patch and batch size are those of nnU-Net's planner at this spacing.

    Args:
        dataset: its name.
        dataset_json: with absolute paths under `dataset`.
        fingerprint: of `fingerprint_of`, in RAS order.
        plans_name: of the new plans.
        spacing: mm, array order.
        preset: network size.
        settings: as for `make_mim_plans`.

    Returns:
        (plans, lines that say what was chosen).

    Raises:
        MiMError: bad settings, or nnU-Net cannot plan this dataset.
    """
    target = [float(s) for s in spacing]
    cases = list(zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True))
    shape = np.median([compute_new_shape(n, s, target) for n, s in cases], axis=0)
    n_voxels = float(np.prod(shape)) * dataset_json["numTraining"]
    with _planner(dataset, dataset_json, fingerprint, plans_name, target) as planner:
        try:
            configuration = planner.get_plans_for_configuration(
                np.array(target), shape, planner.generate_data_identifier(CONFIGURATION), n_voxels, {}
            )
            reader = planner.determine_reader_writer().__name__
        except (RuntimeError, KeyError, ValueError) as error:
            raise MiMError(f"nnU-Net cannot plan {dataset} ({type(error).__name__}: {error})") from error
    base = {
        "dataset_name": dataset,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": np.median(fingerprint["spacings"], axis=0).tolist(),
        "original_median_shape_after_transp": np.median(fingerprint["shapes_after_crop"], axis=0).round().tolist(),
        "image_reader_writer": REORIENTING.get(reader, reader),
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: {**configuration, "batch_dice": False}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": fingerprint["foreground_intensity_properties_per_channel"],
    }
    recursive_fix_for_json_export(base)
    return make_mim_plans(
        base, dict(fingerprint), dict(dataset_json), plans_name, CONFIGURATION, preset, None, dict(settings)
    )


@contextmanager
def _planner(
    dataset: str, dataset_json: Mapping[str, Any], fingerprint: Mapping[str, Any], plans_name: str, target: list[float]
) -> Iterator[ExperimentPlanner]:
    """nnU-Net's planner in folders of its own: it reads files, and the user's are not to be written before it is known
    that they may be.
    """
    before = {name: os.environ.get(name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_n_proc_DA")}
    os.environ["nnUNet_n_proc_DA"] = "1"  # with 0, which is right for training, the planner fails
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(StringIO()):
        for name, file, content in (
            ("nnUNet_raw", DATASET_JSON, dataset_json), ("nnUNet_preprocessed", FINGERPRINT, fingerprint)
        ):  # fmt: skip
            folder = Path(temporary, name, dataset)
            folder.mkdir(parents=True)
            (folder / file).write_text(json.dumps(content))
            os.environ[name] = str(folder.parent)
        try:
            yield ExperimentPlanner(
                dataset, plans_name=plans_name, overwrite_target_spacing=target, suppress_transpose=True
            )
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
