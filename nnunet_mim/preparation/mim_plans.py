"""nnU-Net plans for MiM: a wide CT window, HybridUNet, a patch size that fits it, the finetuning recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_mim.checkpoint.format import HYBRID_KEYS, PretrainedCheckpoint
from nnunet_mim.config import PRESETS
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import cumulative_strides, suitable_strides
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.networks.resenc import check_resenc
from nnunet_mim.nnunet.documents import check_patch, read_plans
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WIDE_CT_WINDOW
from nnunet_mim.nnunet.orientation import REORIENTING
from nnunet_mim.nnunet.plans import configuration_of, n_channels, spacings_alike, voxels_key
from nnunet_mim.settings import check_known_keys, setting
from nnunet_mim.trainers.finetune_config import PLANS_KEY, FinetuneConfig, default_mirror_axes
from nnunet_mim.trainers.resolve_plans import network_for
from nnunet_mim.trainers.transfer import check_channels


@dataclass(frozen=True)
class PlanSettings:
    """What `mim_plan --set` and `mim_prepare --set` can change in plans, beside the recipe (FinetuneConfig)."""

    patch_size: tuple[int, int, int] | None = setting(
        None,
        "voxels per axis in the plans' order of axes, multiples of the network's strides",
        default_text="the base plans', made to fit",
    )
    spacing: tuple[float, float, float] | None = setting(
        None, "mm per axis in the plans' order of axes", default_text="the base plans', or pretraining's"
    )
    batch_size: int | None = setting(None, "patches per step", default_text="the base plans'")
    ct_window: tuple[float, float] | None = setting(
        None, "lowest and highest HU of a CT channel", default_text="-1000, 1000, or pretraining's"
    )

    def __post_init__(self) -> None:
        for name, unit in (("patch_size", "voxels"), ("spacing", "mm")):
            value = getattr(self, name)
            if value is not None and not _is_numbers(value, 3):
                raise MiMError(
                    f"--set {name} must be three numbers ({unit}, the plans' order of axes), e.g. {name}=96,96,96; got "
                    f"{value}"
                )
        if self.spacing is not None and min(self.spacing) <= 0:
            raise MiMError(f"--set spacing (mm, the plans' order of axes) must be above 0, got {self.spacing}")
        if self.batch_size is not None and (type(self.batch_size) is not int or self.batch_size < 1):
            raise MiMError(f"--set batch_size must be a whole number above 0, got {self.batch_size}")
        window = self.ct_window
        if window is not None and (not _is_numbers(window, 2) or window[0] >= window[1]):
            raise MiMError(
                f"--set ct_window must be the lowest and the highest HU, e.g. ct_window=-1000,1000; got {window}"
            )


def make_mim_plans(
    base_plans: dict[str, Any],
    fingerprint: dict[str, Any],
    dataset_json: dict[str, Any],
    plans_name: str,
    configuration: str = "3d_fullres",
    preset: str | None = "base",
    checkpoint: PretrainedCheckpoint | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Plans with one configuration, from a dataset's base plans and fingerprint.

    Args:
        preset: network size where there is no checkpoint. None: keep the residual encoder U-Net of the base plans,
            without a recipe.
        checkpoint: pretraining to finetune; its network, spacing and intensity windows are used where they suit.
        settings: fields of PlanSettings and FinetuneConfig.

    Returns:
        (plans, lines that say what was chosen and why).

    Raises:
        MiMError: bad settings, a 2-D configuration, a checkpoint that does not fit.
    """
    keep_network = preset is None and checkpoint is None
    recipe_names = [] if keep_network else [field.name for field in fields(FinetuneConfig)]
    settings = settings or {}
    check_known_keys(settings, [*recipe_names, *(field.name for field in fields(PlanSettings))], "--set")
    recipe = FinetuneConfig(**{name: value for name, value in settings.items() if name in recipe_names})
    chosen = PlanSettings(**{name: value for name, value in settings.items() if name not in recipe_names})
    notes: list[str] = []
    if checkpoint is not None:
        check_channels(checkpoint, n_channels(dataset_json))
        base_plans, notes = _oriented_like(checkpoint, base_plans, configuration)
    config = deepcopy(configuration_of(base_plans, configuration))
    plans = {k: v for k, v in deepcopy(base_plans).items() if k not in ("configurations", "pretrain_info")}
    plans["plans_name"] = plans_name
    for key in ("inherits_from", "next_stage", "previous_stage"):
        config.pop(key, None)
    config["data_identifier"] = f"{plans_name}_{configuration}"
    plans["foreground_intensity_properties_per_channel"], window_notes = _intensity_windows(
        plans["foreground_intensity_properties_per_channel"],
        config["normalization_schemes"],
        checkpoint,
        chosen.ct_window,
    )

    spacing, reason = _choose_spacing(config["spacing"], checkpoint, chosen.spacing)
    notes.append(f"spacing (mm, the plans' order of axes): {[round(s, 3) for s in spacing]} ({reason})")
    if spacing != list(config["spacing"]):
        config["median_image_size_in_voxels"] = _median_shape(fingerprint, spacing, base_plans["transpose_forward"])
    config["spacing"] = spacing
    notes.extend(_fit_network(config, preset, checkpoint, chosen))
    plans["configurations"] = {configuration: config}
    if checkpoint is not None:
        plans["pretrain_info"] = {  # for nnU-Net's development branch and nnUNetTrainerMiM
            "checkpoint_path": checkpoint.path,
            "pt_num_in_channels": checkpoint.in_channels,
            "pt_used_patchsize": list(checkpoint.view_size),
            **HYBRID_KEYS,
        }
    if not keep_network:
        if recipe.mirror_axes is None:
            recipe = replace(recipe, mirror_axes=default_mirror_axes(base_plans["transpose_forward"]))
        plans[PLANS_KEY] = recipe.to_dict()
    return plans, [*notes, *window_notes]


def _fit_network(
    config: dict[str, Any], preset: str | None, checkpoint: PretrainedCheckpoint | None, chosen: PlanSettings
) -> list[str]:
    """Set architecture, patch size and batch size of a configuration whose spacing is settled. Returns notes."""
    notes: list[str] = []
    network = None
    if checkpoint is not None:
        network, notes = network_for(checkpoint, tuple(config["spacing"]))
    elif preset is not None:
        network = replace(PRESETS[preset], strides=suitable_strides(tuple(config["spacing"])))
    if network is not None:
        step = network.token_size
    else:
        check_resenc(config["architecture"])
        step = cumulative_strides(config["architecture"]["arch_kwargs"]["strides"])[-1]
    median = config["median_image_size_in_voxels"]
    patch = chosen.patch_size
    if patch is not None and any(type(n) is not int or n < s or n % s for n, s in zip(patch, step, strict=True)):
        token = f"{list(step)} (the plans' order of axes)"
        raise MiMError(f"--set patch_size must be multiples of the token size {token}, got {patch}")
    config["patch_size"] = list(patch or _suitable_patch(config["patch_size"], median, step))
    check_patch("the patch", config["patch_size"], "give a smaller one with --set patch_size=96,96,96")
    config["batch_size"] = chosen.batch_size or config["batch_size"]
    if network is not None:
        widths = checkpoint.unet_widths if checkpoint is not None else None
        config["architecture"] = plans_architecture(network, config["patch_size"], widths)
    patch_text = f"patch {config['patch_size']} (voxels, the plans' order of axes), batch {config['batch_size']}"
    return [*notes, f"{patch_text} (base plans: median image {median})"]


def _oriented_like(
    checkpoint: PretrainedCheckpoint, base_plans: dict[str, Any], configuration: str
) -> tuple[dict[str, Any], list[str]]:
    """Base plans with the order of axes and the orientation of images that a network was pretrained with, and notes.

    What the checkpoint does not say stays as it is.
    """
    plans, notes = deepcopy(base_plans), []
    before = plans["transpose_forward"]
    order = [int(axis) for axis in checkpoint.provenance.get("transpose_forward", before)]
    if order != before:
        positions = [before.index(axis) for axis in order]
        config = configuration_of(plans, configuration)
        for key in ("spacing", "patch_size", "median_image_size_in_voxels"):
            config[key] = [config[key][i] for i in positions]
        for key in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
            if key in plans:
                plans[key] = [plans[key][i] for i in positions]
        plans["configurations"] = {configuration: {k: v for k, v in config.items() if k != "inherits_from"}}
        plans |= {"transpose_forward": order, "transpose_backward": np.argsort(order).tolist()}
        notes.append(f"order of axes {order} (as in pretraining; base plans: {before})")
    reader = plans.get("image_reader_writer", "")
    if checkpoint.provenance.get("image_reader_writer") in REORIENTING.values() and reader in REORIENTING:
        plans["image_reader_writer"] = REORIENTING[reader]
        notes.append(f"images are turned to RAS by {REORIENTING[reader]} (as in pretraining)")
    return plans, notes


def _intensity_windows(
    base: dict[str, Any],
    schemes: Sequence[str],
    checkpoint: PretrainedCheckpoint | None,
    given: tuple[float, float] | None,
) -> tuple[dict[str, Any], list[str]]:
    """foreground_intensity_properties_per_channel of new plans, from those of the base plans, and notes.

    CT channels get the window given with --set (lowest and highest HU), else that of the checkpoint, else the wide one.
    """
    windows, notes = deepcopy(base), []
    provenance = checkpoint.provenance if checkpoint is not None else {}
    pretrained_schemes = provenance.get("normalization") or []
    for channel, scheme in enumerate(schemes):
        source = min(channel, len(pretrained_schemes) - 1)
        before = pretrained_schemes[source] if pretrained_schemes else scheme
        if before != scheme:
            notes.append(f"WARNING: channel {channel} is normalised with {scheme}, in pretraining with {before}")
        if scheme != CT_NORMALIZATION:
            continue
        stored = (provenance.get("intensity_properties") or {}).get(str(source)) if before == scheme else None
        window = {**WIDE_CT_WINDOW, **{name: float(value) for name, value in (stored or {}).items()}}
        reason = "as in pretraining" if stored else "the wide window"
        if given is not None:
            clip = {"percentile_00_5": float(given[0]), "percentile_99_5": float(given[1])}
            differs = bool(stored) and any(window[name] != value for name, value in clip.items())
            reason = "--set; WARNING: another one in pretraining" if differs else "--set"
            window |= clip
        windows[str(channel)] = window
        notes.append(
            f"channel {channel}: CT window {window['percentile_00_5']:g}…{window['percentile_99_5']:g} HU, mean "
            f"{window['mean']:g}, std {window['std']:g} ({reason})"
        )
    return windows, notes


def _median_shape(
    fingerprint: dict[str, Any], spacing: Sequence[float], transpose_forward: Sequence[int]
) -> list[float]:
    """Median number of voxels per axis (transposed array order) after resampling to `spacing` (mm, same order)."""
    order = list(transpose_forward)
    sizes_mm = np.array(fingerprint["spacings"])[:, order] * np.array(fingerprint["shapes_after_crop"])[:, order]
    return [float(n) for n in np.median(np.round(sizes_mm / np.array(spacing)), axis=0)]


def _suitable_patch(base_patch: Sequence[int], median: Sequence[float], token_size: Sequence[int]) -> list[int]:
    """The multiple of the token size nearest to the base patch, and no larger than the median image needs."""
    patch = []
    for size, n, token in zip(base_patch, median, token_size, strict=True):
        nearest = math.floor(size / token + 0.5) * token
        patch.append(max(token, min(nearest, math.ceil(n / token) * token)))
    return patch


def check_can_write(plans: dict[str, Any], plans_file: Path, overwrite: bool, name_flag: str = "-o") -> bool:
    """Whether the preprocessed folder exists and was made with the same spacing and normalisation.

    Raises MiMError where it was made with others and `overwrite` is off.
    """
    (configuration,) = plans["configurations"]
    folder = plans_file.parent / plans["configurations"][configuration]["data_identifier"]
    if not folder.is_dir():
        return False
    same = same_voxels(plans, plans_file)
    if not same and not overwrite:
        raise MiMError(
            f"{folder} was preprocessed with another spacing or normalisation than the new {plans['plans_name']}: "
            f"choose another name with {name_flag}, or --overwrite and preprocess again"
        )
    return same


def same_voxels(plans: dict[str, Any], plans_file: Path) -> bool:
    """Whether plans make the same voxels as those in a file; False where there is none that can be read."""
    (configuration,) = plans["configurations"]
    try:
        return voxels_key(read_plans(plans_file), configuration) == voxels_key(plans, configuration)
    except (MiMError, KeyError):
        return False


def _choose_spacing(
    base: Sequence[float], checkpoint: PretrainedCheckpoint | None, given: Sequence[float] | None
) -> tuple[list[float], str]:
    if given is not None:
        return [float(s) for s in given], "as given"
    pretrained = checkpoint.provenance.get("spacing") if checkpoint is not None else None
    if not pretrained:
        return list(base), "base plans"
    shown = [round(float(s), 3) for s in pretrained]
    if spacings_alike(pretrained, base):
        return [float(s) for s in pretrained], "as in pretraining"
    return list(base), f"base plans; WARNING: pretrained at {shown}, too far from this dataset's own to be taken over"


def _is_numbers(value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and all(type(n) in (int, float) for n in value)
