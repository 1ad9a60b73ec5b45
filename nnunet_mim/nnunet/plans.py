"""What this package reads out of nnU-Net's plans and dataset.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.nnunet.documents import HYBRID_UNET, complete_configuration, read_plans
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WIDE_CT_WINDOW, WINDOW_FIELDS

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


def require_preprocessed(folder: Path, plans: dict[str, Any], plans_name: str, configuration: str) -> None:
    """Raise MiMError unless there are files in the folder of a configuration's preprocessed cases.

    Args:
        folder: of these cases, in that of the dataset.
        plans: as of `read_plans`.
        plans_name: that of their file.
        configuration: of the plans.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        raise MiMError(
            f"{folder.parent.name} is not preprocessed for {plans_name} {configuration} ({folder} is missing or "
            f"empty): run {preprocess_command(folder, plans, plans_name, configuration)}"
        )


def preprocess_command(folder: Path, plans: dict[str, Any], plans_name: str, configuration: str) -> str:
    """The command that preprocesses the cases of `folder` once more; arguments as of `require_preprocessed`."""
    if is_mim_prepared(folder):
        config = configuration_of(plans, configuration)
        return mim_prepare_command(
            folder.parent.name[7:10], zyx_of(config["spacing"], plans), plans_name, _window_option(plans, config)
        )
    return f"nnUNetv2_preprocess -d {folder.parent.name[7:10]} -plans_name {plans_name} -c {configuration}"


def has_no_labels(dataset: Path) -> bool:
    """Whether mim_prepare has prepared a dataset (its folder in nnUNet_preprocessed) without labels.

    nnU-Net cannot preprocess such a dataset.
    """
    return (dataset / "mim_prepare").is_dir() and not (dataset / "gt_segmentations").is_dir()


def is_mim_prepared(folder: Path) -> bool:
    """Whether it is mim_prepare that makes the preprocessed cases of a folder."""
    return has_no_labels(folder.parent) or (folder.parent / "mim_prepare" / f"{folder.name}.jsonl").is_file()


def mim_prepare_command(numbers: str, spacing_zyx: Sequence[float], plans_name: str, options: str = "") -> str:
    """The command that prepares datasets with a spacing (mm along z, y, x) and a name of plans."""
    spacing = " ".join(f"{mm:g}" if float(f"{mm:g}") == mm else repr(mm) for mm in map(float, spacing_zyx))
    return f"mim_prepare -d {numbers} -s {spacing} -p {plans_name}{options}"


def zyx_of(values: Sequence[float], plans: dict[str, Any]) -> tuple[float, ...]:
    """Values along the axes of plans, in the order (z, y, x) of the images."""
    order = plans.get("transpose_forward", [0, 1, 2])
    return tuple(values[order.index(axis)] for axis in range(3))


def preset_of(config: dict[str, Any]) -> str:
    """The preset whose network a configuration names; empty where there is none."""
    kwargs = config["architecture"]["arch_kwargs"] if uses_hybrid_unet(config) else {}
    wanted = [kwargs.get("embed_dims"), kwargs.get("depths"), kwargs.get("num_heads")]
    sizes = {name: [list(of.embed_dims), list(of.depths), of.num_heads] for name, of in PRESETS.items()}
    return next((name for name, found in sizes.items() if found == wanted), "")


def preset_option(config: dict[str, Any]) -> str:
    """The option that gives new plans the network of a configuration; empty where it names no preset's."""
    preset = preset_of(config)
    return f" --preset {preset}" if preset else ""


def _window_option(plans: dict[str, Any], config: dict[str, Any]) -> str:
    """What mim_prepare has to be told where the CT window is not its own; it writes the plans anew then."""
    windows = plans["foreground_intensity_properties_per_channel"]
    for channel, scheme in enumerate(config["normalization_schemes"]):
        bounds = [windows.get(str(channel), WIDE_CT_WINDOW)[name] for name in WINDOW_FIELDS[:2]]
        if scheme == CT_NORMALIZATION and bounds != [WIDE_CT_WINDOW[name] for name in WINDOW_FIELDS[:2]]:
            return f"{preset_option(config)} --set ct_window={','.join(f'{hu:g}' for hu in bounds)}"
    return ""


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
