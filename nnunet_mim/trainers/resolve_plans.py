"""From the plans nnU-Net hands over to the plans a trainer runs with and saves: architecture and recipe filled in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.checkpoint.format import PretrainedCheckpoint
from nnunet_mim.checkpoint.locate import FINAL, find_checkpoint, no_checkpoint_error
from nnunet_mim.config import PRESETS, NetworkConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import suitable_strides
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.nnunet.orientation import MIRRORING_IS_OFF, REORIENTING, mirroring_is_unsafe
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig
from nnunet_mim.trainers.transfer import check_architecture, describe

DEFAULT_PRESET = "base"
MAX_SPACING_RATIO = 1.5
"""up to which, on every axis, a checkpoint's spacing is taken as that of a dataset"""


@dataclass
class ResolvedPlans:
    """What a trainer starts from."""

    plans: dict[str, Any]
    """a copy with HybridUNet as the configuration's architecture, and a complete `mim_finetune`"""
    finetune: FinetuneConfig
    checkpoint: PretrainedCheckpoint | None
    """already read and checked where this is surely a fresh training"""
    notes: list[str]
    """lines for the training log"""


def resolve_plans(
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: dict[str, Any],
    trainer: str,
    pretrained: bool,
) -> ResolvedPlans:
    """Check everything that can be wrong before nnU-Net does anything, and fill in what the plans leave open.

    Plans of `mim_plan` name HybridUNet already, and mirroring axes. Other plans give patch, batch and spacing; the
    architecture is then, first hit: that of folds trained in the same output folder, (control) that of
    nnUNetTrainerMiM's output folder, that of the pretraining checkpoint, (control) the default preset. Mirroring axes
    are those of these folders too, and of a new training none where the raw images are not stored in axial slices.

    Args:
        plans: content of the plans file, with `continue_training` as nnU-Net adds it; not changed.
        configuration: e.g. 3d_fullres.
        fold: number or "all".
        dataset_json: content of dataset.json.
        trainer: class name, part of the output folder's name.
        pretrained: whether this trainer starts from a pretraining checkpoint.

    Raises:
        MiMError: any bad input; one line.
    """
    plans = deepcopy(plans)
    finetune = FinetuneConfig.from_plans(plans)
    config = configuration_of(plans, configuration)
    require_preprocessed(plans, configuration, config)
    results = required_folder("nnUNet_results")
    run_folder = Path(results, plans["dataset_name"], f"{trainer}__{plans['plans_name']}__{configuration}")
    fold_folder = run_folder / f"fold_{fold}"
    if plans.get("continue_training") and not any(fold_folder.glob("checkpoint_*.pth")):
        raise MiMError(f"--c: nothing to continue in {fold_folder}: start the training without --c")

    sibling = Path(results, plans["dataset_name"], f"nnUNetTrainerMiM__{plans['plans_name']}__{configuration}")
    control_of = None if pretrained else sibling
    architecture, notes = _planned_or_saved_architecture(plans, configuration, config, run_folder, control_of)

    checkpoint = None
    surely_fresh = not plans.get("continue_training") and not (fold_folder / FINAL).is_file()
    if surely_fresh and (pretrained or architecture is None):
        path = find_checkpoint(plans, configuration, fold, results)
        if path is not None:
            checkpoint = PretrainedCheckpoint.load(path)
        elif pretrained:
            raise no_checkpoint_error(plans, configuration, fold, results)
    if architecture is None:
        architecture, origin, network_notes = _architecture_for_other_plans(config, checkpoint)
        notes.append(f"Plans {plans['plans_name']} name another network, replaced by HybridUNet of {origin}")
        notes += network_notes + _deep_supervision_note(architecture, config["patch_size"])

    if finetune.mirror_axes is None:
        axes, axes_notes = _mirror_axes(plans, dataset_json, [run_folder] if pretrained else [run_folder, sibling])
        finetune = replace(finetune, mirror_axes=axes)
        notes += axes_notes

    architecture["arch_kwargs"]["drop_path"] = finetune.drop_path
    if checkpoint is not None and pretrained:
        check_architecture(checkpoint, architecture["arch_kwargs"], n_channels(dataset_json))
    plans["configurations"][configuration]["architecture"] = architecture
    plans[PLANS_KEY] = finetune.to_dict()
    return ResolvedPlans(plans, finetune, checkpoint if pretrained else None, notes)


def network_for(checkpoint: PretrainedCheckpoint, spacing: tuple[float, ...]) -> tuple[NetworkConfig, list[str]]:
    """The pretrained network at a spacing (mm, array order): with strides of its own where pretraining had voxels of
    another shape, as its tokens would be long and thin.

    Returns:
        (sizes, notes).
    """
    network, pretrained = checkpoint.network, checkpoint.provenance.get("spacing")
    if not pretrained or spacings_alike(pretrained, spacing):
        return network, []
    strides = suitable_strides(spacing)
    if strides == network.strides:
        return network, []
    shown = [[list(stride) for stride in of] for of in (strides, network.strides)]
    note = f"strides {shown[0]} suit this spacing (pretraining: {shown[1]}); kernels between stages are resized to them"
    return replace(network, strides=strides), [note]


def spacings_alike(pretrained: Sequence[float], spacing: Sequence[float]) -> bool:
    """Whether two spacings (mm, same order of axes) differ by no more than MAX_SPACING_RATIO on any axis."""
    return all(1 / MAX_SPACING_RATIO <= p / s <= MAX_SPACING_RATIO for p, s in zip(pretrained, spacing, strict=True))


def configuration_of(plans: dict[str, Any], configuration: str) -> dict[str, Any]:
    """A 3-D configuration of the plans, inheritance resolved.

    Raises:
        MiMError: not in the plans, 2-D, or the second stage of a cascade.
    """
    available = sorted(plans["configurations"])
    if configuration not in available:
        raise MiMError(
            f"configuration {configuration} is not in plans {plans['plans_name']}: available are {', '.join(available)}"
        )
    config = PlansManager(deepcopy(plans)).get_configuration(configuration).configuration
    if len(config["patch_size"]) != 3:
        raise MiMError(f"configuration {configuration} is 2-D and MiM networks are 3-D: use 3d_fullres")
    if config.get("previous_stage"):
        raise MiMError(f"configuration {configuration} is a cascade, unknown to MiM: use 3d_fullres or 3d_lowres")
    return config


def require_preprocessed(plans: dict[str, Any], configuration: str, config: dict[str, Any]) -> None:
    """Raise MiMError unless the cases of this configuration have been preprocessed."""
    dataset, plans_name = plans["dataset_name"], plans["plans_name"]
    folder = Path(required_folder("nnUNet_preprocessed"), dataset, config["data_identifier"])
    if not folder.is_dir() or not any(folder.iterdir()):
        raise MiMError(
            f"{dataset} is not preprocessed for {plans_name} {configuration} ({folder} is missing or empty): run "
            f"nnUNetv2_preprocess -d {dataset[7:10]} -plans_name {plans_name} -c {configuration}"
        )


def n_channels(dataset_json: dict[str, Any]) -> int:
    """Image channels of a dataset (`modality` is the old name of `channel_names`)."""
    return len(dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"])


def uses_hybrid_unet(config: dict[str, Any]) -> bool:
    """Whether a configuration of a plans file names our network."""
    return config.get("architecture", {}).get("network_class_name", "").rsplit(".", 1)[-1] == HybridUNet.__name__


def saved_plans(run_folder: Path) -> dict[str, Any] | None:
    """Content of the plans.json of an output folder in which at least one fold has a checkpoint."""
    plans_file = run_folder / "plans.json"
    if not plans_file.is_file() or not any(run_folder.glob("fold_*/checkpoint_*.pth")):
        return None
    return json.loads(plans_file.read_text())


def saved_architecture(run_folder: Path, configuration: str) -> dict[str, Any] | None:
    """Architecture of `saved_plans`."""
    config = (saved_plans(run_folder) or {"configurations": {}})["configurations"].get(configuration, {})
    return config["architecture"] if uses_hybrid_unet(config) else None


def same_architecture(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Equal but for drop_path, which belongs to the recipe and changes no parameter."""
    kwargs = [{k: v for k, v in block["arch_kwargs"].items() if k != "drop_path"} for block in (a, b)]
    return a["network_class_name"] == b["network_class_name"] and kwargs[0] == kwargs[1]


def _planned_or_saved_architecture(
    plans: dict[str, Any], configuration: str, config: dict[str, Any], run_folder: Path, control_of: Path | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """Architecture of the plans, else of folds trained in the output folder, else of the training that this one is the
    control of; and notes.
    """
    planned = config["architecture"] if uses_hybrid_unet(config) else None
    saved = saved_architecture(run_folder, configuration)
    if planned and saved and not same_architecture(planned, saved):
        raise MiMError(
            f"{run_folder} holds folds of another architecture than the plans {plans['plans_name']} have now: "
            f"move that folder away, or write plans under another name (mim_plan -o NAME)"
        )
    if planned or saved or control_of is None:
        return planned or saved, []
    architecture = saved_architecture(control_of, configuration)
    if architecture is None:
        return None, []
    note = f"Plans {plans['plans_name']} name another network, replaced by that of {control_of.name}, whose control "
    return architecture, [f"{note}this is", *_deep_supervision_note(architecture, config["patch_size"])]


def _mirror_axes(
    plans: dict[str, Any], dataset_json: dict[str, Any], folders: Sequence[Path]
) -> tuple[tuple[int, ...] | None, list[str]]:
    """Axes where the plans name none, and notes. All trainings in these folders have the same, whatever has become of
    the raw images since the first of them.
    """
    for folder in folders:
        saved = saved_plans(folder)
        if saved is not None:
            axes = saved.get(PLANS_KEY, {}).get("mirror_axes")
            return (None if axes is None else tuple(axes)), []
    raw = Path(os.environ.get("nnUNet_raw", ""), plans["dataset_name"])
    if plans.get("image_reader_writer") in REORIENTING.values() or not mirroring_is_unsafe(raw, dataset_json):
        return None, []
    return (), [MIRRORING_IS_OFF]


def _architecture_for_other_plans(
    config: dict[str, Any], checkpoint: PretrainedCheckpoint | None
) -> tuple[dict[str, Any], str, list[str]]:
    """(architecture, what it is of, notes)"""
    if checkpoint is not None:
        network, notes = network_for(checkpoint, tuple(config["spacing"]))
        architecture = plans_architecture(network, config["patch_size"])
        return architecture, f"the checkpoint ({checkpoint.preset}: {describe(network)})", notes
    preset = replace(PRESETS[DEFAULT_PRESET], strides=suitable_strides(tuple(config["spacing"])))
    return (
        plans_architecture(preset, config["patch_size"]),
        f"the default preset {DEFAULT_PRESET} ({describe(preset)}); the control of a pretrained network needs the same "
        f"one: set nnUNet_mim_checkpoint or use plans of mim_plan",
        [],
    )


def _deep_supervision_note(architecture: dict[str, Any], patch_size: list[int]) -> list[str]:
    """nnU-Net rounds the size of low-resolution targets; say where that shifts them against the network's grid."""
    strides = architecture["arch_kwargs"]["strides"]
    steps = [1, 1, 1]
    for stride in strides[: len(strides) - 2]:  # the lowest supervised level has no weight in the loss
        steps = [a * b for a, b in zip(steps, stride, strict=True)]
    if all(n % s == 0 for n, s in zip(patch_size, steps, strict=True)):
        return []
    return [
        f"Patch size {list(patch_size)} is no multiple of {steps}: low-resolution targets of deep supervision are off "
        f"by up to half a voxel of theirs; plans of mim_plan have a patch size that fits"
    ]
