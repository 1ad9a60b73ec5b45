"""From a checkpoint of the published MiM architecture (arXiv 2404.15580) to one of this package.

Only names and one layer change: the published network saw intensities in [0, 1], ours sees HU / 250. The affine map
between the two is folded into the first convolution, which is exact because that convolution has no padding.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_mim.checkpoint.format import build_checkpoint, is_state_dict
from nnunet_mim.checkpoint.torch_file import read_torch_file
from nnunet_mim.config import PRESETS, PretrainConfig
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.networks.hybrid_unet import HybridUNet
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.networks.vit_blocks import sincos_position
from nnunet_mim.nnunet.intensities import CT_NORMALIZATION, WIDE_CT_WINDOW
from nnunet_mim.system.untrusted import NOT_REGULAR

PUBLISHED_WINDOW = (-1000.0, 1000.0)
"""HU that the published pretraining mapped to 0 and 1"""
LICENCE_NOTE = (
    "The published weights carry no licence. Ask their authors before you use them for more than looking, or pass them "
    "on; converting changes nothing about that."
)

COMPUTED = ("pos_embed", "decoder_pos_embed")
"""published tensors that are no parameters here: fixed positions, computed and compared"""
FIRST_CONVOLUTION = HybridUNet.keys_to_in_proj[0]

_RENAMES = (
    (r"patch_embed([123])\.", r"encoder.stages.{stage}.embed."),
    (r"patch_embed4\.", r"encoder.token_embed."),
    (r"patch_embed5\.", r"encoder.token_proj."),
    (r"stage([123])_output_decode\.", r"encoder.stages.{stage}.to_token."),
    (r"blocks([123])\.(\d+)\.attn\.", r"encoder.stages.{stage}.blocks.{block}.dwconv."),
    (r"blocks([123])\.(\d+)\.", r"encoder.stages.{stage}.blocks.{block}."),
    (r"blocks4\.", r"encoder.vit_blocks."),
    (r"norm\.", r"encoder.norm."),
    (r"mask_token$", r"decoder.mask_token"),
    (r"decoder_embed\.", r"decoder.embed."),
    (r"decoder_blocks\.", r"decoder.blocks."),
    (r"decoder_norm\.", r"decoder.norm."),
    (r"decoder_pred\.", r"decoder.head."),
    (r"aggregate_mid\.", r"projectors.child.0."),
    (r"aggregate_pred_up_feature\.", r"projectors.parent.0."),
    (r"aggregate_down\.", r"projectors.child.1."),
    (r"aggregate_pred_mid_feature\.", r"projectors.parent.1."),
)


def our_name(published: str) -> str | None:
    """Name in MaskInMask of a published tensor; None for one that has no place here."""
    for pattern, template in _RENAMES:
        if match := re.match(pattern, published):
            stage, block = (*match.groups(), None, None)[:2]
            return template.format(stage=int(stage or 1) - 1, block=block) + published[match.end() :]
    return None


def read_published(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a published checkpoint without executing anything in the file.

    Args:
        path: written by `torch.save`: a dict with the state dict under `model`. Beside tensors and plain containers
            only `argparse.Namespace` is allowed (the published file keeps its options in one), and is not used.

    Raises:
        MiMError: missing, damaged, holding anything else (named), or without `model`.
    """
    if not path.is_file():
        reason = f"is {NOT_REGULAR}: copy it into a file" if path.exists() else "does not exist: correct the path"
        raise MiMError(f"{path} {reason}")
    stored = read_torch_file(path, namespaces=True)
    model = stored.get("model") if isinstance(stored, dict) else None
    if not is_state_dict(model):
        raise MiMError(f"{path} is no published MiM checkpoint: it holds no state dict under 'model'")
    if wrong := [key for key, value in model.items() if not value.is_floating_point()]:
        raise MiMError(f"{path}: tensor {printable(wrong[0])} holds whole numbers: get the file from its authors")
    return model


def convert_weights(published: dict[str, Tensor], window: tuple[float, float] = PUBLISHED_WINDOW) -> dict[str, Tensor]:
    """State dict of MaskInMask (preset base) that computes what the published network does, on voxels in HU / 250.

    Args:
        published: state dict of the published network.
        window: HU that it saw as 0 and as 1.

    Raises:
        MiMError: a tensor is missing, unknown, of another shape, or a position embedding is not the fixed one.
    """
    if window[0] >= window[1]:
        raise MiMError(f"--window {window[0]:g} {window[1]:g}: the lower end comes first")
    first = published.get("patch_embed1.proj.weight")
    in_channels = 1 if first is None or first.ndim != 5 else first.shape[1]
    with torch.device("meta"):
        wanted = MaskInMask(PRESETS["base"], in_channels).state_dict()
    names = {key: our_name(key) or "" for key in published if key not in COMPUTED}
    unknown = [key for key, name in names.items() if name not in wanted]
    missing = [name for name in wanted if name not in names.values()]
    missing += [key for key in COMPUTED if key not in published]
    if unknown or missing:
        raise MiMError(
            f"not the published base architecture: {len(unknown)} unknown tensors ({_some(unknown)}), {len(missing)} "
            f"missing ({_some(missing)})"
        )
    shapes = [
        f"{key} {tuple(published[key].shape)} instead of {tuple(wanted[name].shape)}"
        for key, name in names.items()
        if published[key].shape != wanted[name].shape
    ]
    if shapes:
        raise MiMError(f"not the published base architecture: {_some(shapes)}")
    _check_positions(published)
    return _rescale_input({name: published[key].clone() for key, name in names.items()}, window)


def _rescale_input(weights: dict[str, Tensor], window: tuple[float, float]) -> dict[str, Tensor]:
    """Fold u = (std * v + mean - low) / (high - low) into the first convolution: W·u + b becomes W'·v + b'."""
    low, high = window
    weight, bias = (weights[f"{FIRST_CONVOLUTION}.{part}"].double() for part in ("weight", "bias"))
    scale = WIDE_CT_WINDOW["std"] / (high - low)
    shift = (WIDE_CT_WINDOW["mean"] - low) / (high - low)
    dtype = weights[f"{FIRST_CONVOLUTION}.weight"].dtype
    return {
        **weights,
        f"{FIRST_CONVOLUTION}.weight": (weight * scale).to(dtype),
        f"{FIRST_CONVOLUTION}.bias": (bias + shift * weight.sum(dim=(1, 2, 3, 4))).to(dtype),
    }


def convert(path: Path, window: tuple[float, float] = PUBLISHED_WINDOW) -> dict[str, Any]:
    """A published checkpoint file as a checkpoint of this package (docs/checkpoint.md), ready to be saved.

    Its plans' CT window is `window`, so that `mim_plan -pc` gives finetuning the intensities of the pretraining.

    Raises:
        MiMError: as `read_published` and `convert_weights`.
    """
    weights = convert_weights(read_published(path), window)
    in_channels = weights[f"{FIRST_CONVOLUTION}.weight"].shape[1]
    clip = {"percentile_00_5": float(window[0]), "percentile_99_5": float(window[1])}
    provenance = {
        "datasets": [],
        "plans_name": "",
        "configuration": "3d_fullres",
        "fold": "all",
        "spacing": [],
        "normalization": [CT_NORMALIZATION] * in_channels,
        "intensity_properties": {str(c): {**WIDE_CT_WINDOW, **clip} for c in range(in_channels)},
        "iterations": 0,
        "loss_history": [],
        "cases": [],
        "converted_from": path.name,
        "note": LICENCE_NOTE,
    }
    return build_checkpoint(weights, PretrainConfig(preset="base", in_channels=in_channels), provenance)


def _check_positions(published: dict[str, Tensor]) -> None:
    """Raise MiMError unless the published tables are the fixed sine-cosine ones that this package computes."""
    for key in COMPUTED:
        table = published[key]
        side = round(table.shape[1] ** (1 / 3)) if table.ndim == 3 else 0
        valid = table.ndim == 3 and table.shape[0] == 1 and side**3 == table.shape[1] and table.shape[2] % 6 == 0
        if not valid or not torch.allclose(
            table[0].double(), sincos_position((side, side, side), table.shape[2], table.double()), atol=1e-4
        ):
            raise MiMError(f"{key} is not the fixed sine-cosine embedding of the published architecture")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown}, …" if len(names) > 3 else shown or "none"
