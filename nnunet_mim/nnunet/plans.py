"""What this package reads out of nnU-Net's plans and dataset.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import complete_configuration, read_plans
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WINDOW_FIELDS

HYBRID_UNET = "nnunet_mim.networks.hybrid_unet.HybridUNet"
"""this package's network in plans; nnU-Net imports what plans name, so that no other module will do"""
MAX_SPACING_RATIO = 1.5
"""two spacings count as alike up to this ratio on every axis"""


def configuration_of(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A 3-D configuration of the plans, with what it inherits filled in.

    Raises MiMError where it is not in the plans, 2-D, or the second stage of a cascade.
    """
    available = sorted(plans["configurations"])
    if configuration not in available:
        raise MiMError(
            f"configuration {configuration} is not in plans {plans['plans_name']}: available are {', '.join(available)}"
        )
    config = complete_configuration(plans, configuration)
    if len(config["patch_size"]) != 3:
        raise MiMError(f"configuration {configuration} is 2-D and MiM networks are 3-D: use 3d_fullres")
    if config.get("previous_stage"):
        raise MiMError(f"configuration {configuration} is a cascade, unknown to MiM: use 3d_fullres or 3d_lowres")
    return config


def require_preprocessed(folder: Path, plans_name: str, configuration: str) -> None:
    """Raise MiMError unless there are files in the folder of a configuration's preprocessed cases."""
    dataset = folder.parent.name
    if not folder.is_dir() or not any(folder.iterdir()):
        raise MiMError(
            f"{dataset} is not preprocessed for {plans_name} {configuration} ({folder} is missing or empty): run "
            f"nnUNetv2_preprocess -d {dataset[7:10]} -plans_name {plans_name} -c {configuration}"
        )


def n_channels(dataset_json: dict[str, Any]) -> int:
    """Number of image channels of a dataset; `modality` is the old name of `channel_names`."""
    return len(dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"])


def uses_hybrid_unet(config: dict[str, Any]) -> bool:
    """Whether a configuration names this package's network."""
    return config.get("architecture", {}).get("network_class_name") == HYBRID_UNET


def saved_plans(run_folder: Path) -> dict[str, Any] | None:
    """The plans.json of an output folder of nnUNetv2_train; None where no fold in it has a checkpoint."""
    plans_file = run_folder / "plans.json"
    if not plans_file.is_file() or not any(run_folder.glob("fold_*/checkpoint_*.pth")):
        return None
    return read_plans(plans_file)


def saved_architecture(run_folder: Path, configuration: str) -> dict[str, Any] | None:
    """Architecture in the saved plans of an output folder; None where there is none, or of another network."""
    plans = saved_plans(run_folder) or {"configurations": {}}
    config = plans["configurations"].get(configuration, {})
    return config["architecture"] if uses_hybrid_unet(config) else None


def same_architecture(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two architectures are equal but for drop_path, which belongs to the recipe and changes no parameter."""
    kwargs = [{k: v for k, v in block["arch_kwargs"].items() if k != "drop_path"} for block in (a, b)]
    return a["network_class_name"] == b["network_class_name"] and kwargs[0] == kwargs[1]


def spacings_alike(pretrained: Sequence[float], spacing: Sequence[float]) -> bool:
    """Whether two spacings (mm, same order of axes) differ by no more than MAX_SPACING_RATIO on any axis."""
    return all(1 / MAX_SPACING_RATIO <= p / s <= MAX_SPACING_RATIO for p, s in zip(pretrained, spacing, strict=True))


def voxels_key(plans: dict[str, Any], configuration: str) -> list[Any]:
    """Everything in plans that decides the preprocessed voxels, as plain values to compare."""
    config = plans["configurations"][configuration]
    windows = plans["foreground_intensity_properties_per_channel"]
    ct_windows = [
        [windows[str(channel)][name] for name in WINDOW_FIELDS] if scheme == CT_NORMALIZATION else None
        for channel, scheme in enumerate(config["normalization_schemes"])
    ]
    resampling = ("resampling_fn_data", "resampling_fn_data_kwargs")
    settings = [config.get(name) for name in ("spacing", "normalization_schemes", "use_mask_for_norm", *resampling)]
    return [plans["transpose_forward"], plans.get("image_reader_writer"), ct_windows, *settings]
