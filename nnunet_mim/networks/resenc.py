"""nnU-Net's residual encoder U-Net with the interface of MaskInMask.

A convolution cannot leave masked tokens out as a transformer does. They are 0 in the input (0 HU in the wide window),
and the whole U-Net reconstructs (docs/adr/0003-resenc-with-zeros.md). The weights keep nnU-Net's names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor

from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.geometry import cumulative_strides
from nnunet_mim.networks.mask_in_mask import Alignment, MaskedViews, Reconstruction
from nnunet_mim.networks.token_layout import join, pad_at_ends, take_tokens, tokens_from_grid, visible_voxels

CLASS_NAME = "ResidualEncoderUNet"
CLASS_PATH = f"dynamic_network_architectures.architectures.unet.{CLASS_NAME}"
NAMED_CLASSES = {
    "conv_op": ("Conv3d",),
    "norm_op": ("InstanceNorm3d", "BatchNorm3d"),
    "dropout_op": ("Dropout3d",),
    "nonlin": ("LeakyReLU", "ReLU", "GELU"),
}
"""by argument, the classes of torch.nn that plans may name; nothing else that a file names is looked up"""
MODULES = ("torch.nn", "torch.nn.modules.conv", "torch.nn.modules.instancenorm", "torch.nn.modules.batchnorm",
           "torch.nn.modules.dropout", "torch.nn.modules.activation")  # fmt: skip
ARGUMENTS = {
    *NAMED_CLASSES, "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage",
    "n_conv_per_stage_decoder", "conv_bias", "norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs",
}  # fmt: skip
"""arguments of the network in nnU-Net's plans"""
PLAIN_PATH = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
PLAIN_ARGUMENTS = ARGUMENTS - {"n_blocks_per_stage"} | {"n_conv_per_stage"}
"""nnU-Net's default network, which is not pretrained"""


class ResEncMaskInMask(Alignment):
    """A ResidualEncoderUNet that reconstructs masked tokens, and the projectors of MiM (arXiv 2404.15580).

    The features of a token, which alignment compares, are the mean over the token of the encoder's deepest map that is
    not coarser than the grid of tokens.

    Args:
        architecture: block of nnU-Net's plans: `network_class_name`, `arch_kwargs`, `_kw_requires_import`.
        token_size: voxels of a token per axis, a product of the network's first strides.
        in_channels: image channels.
        alignment: as in MaskInMask.

    Raises:
        MiMError: the plans name another network.
    """

    def __init__(
        self, architecture: Mapping[str, Any], token_size: Size3, in_channels: int = 1, alignment: str = "infonce"
    ) -> None:
        check_resenc(architecture)
        kwargs = architecture["arch_kwargs"]
        super().__init__()
        self.token_size = token_size
        self.strides = cumulative_strides(kwargs["strides"])
        self.feature_stage = max(
            stage
            for stage, stride in enumerate(self.strides)
            if all(s <= p for s, p in zip(stride, token_size, strict=True))
        )
        try:
            unet = get_network_from_plans(
                architecture["network_class_name"], kwargs, architecture["_kw_requires_import"], in_channels,
                in_channels, allow_init=True, deep_supervision=False,
            )  # fmt: skip
        except Exception as error:  # nnU-Net's own, or PyTorch's, of arguments that do not fit together
            reason = f"{type(error).__name__}: {printable(error)}"
            raise MiMError(f"{CLASS_NAME} of the plans cannot be built ({reason}): plan the dataset again") from error
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.add_projectors(kwargs["features_per_stage"][self.feature_stage], 2, alignment)

    def forward(self, groups: Sequence[MaskedViews], recompute: bool = False) -> list[Reconstruction]:
        """Do what `MaskInMask.forward` does; `recompute` is ignored."""
        images = join([self.hide(group.images, group.ids_masked) for group in groups])  # (N, C, X, Y, Z) of all groups
        sizes = [len(group.images) for group in groups]
        skips = self.encoder(images)
        features = self._token_features(skips, images).split(sizes)  # (N, L, D) each
        image = self.decoder(skips).permute(0, 2, 3, 4, 1)
        tokens = tokens_from_grid(image, self.token_size).split(sizes)  # (N, L, *token_size, C) each
        return [
            Reconstruction(take_tokens(own, group.ids_masked).flatten(2), part)
            for own, part, group in zip(tokens, features, groups, strict=True)
        ]

    def visible_features(self, images: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Features of the visible tokens, (N, K, D), from the encoder."""
        features = self._token_features(self.encoder(self.hide(images, ids_masked)), images)
        return take_tokens(features, ids_keep)

    @property
    def feature_source(self) -> ResEncMaskInMask:
        """The module whose `forward_features` a label probe reads."""
        return self

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """Encode images (N, C, X, Y, Z) of whole tokens in which nothing is masked.

        Returns:
            Maps (N, D, X, Y, Z), from half resolution down to that of the token features.
        """
        # padded to a size that the network can halve
        size = [-(-n // s) * s for n, s in zip(image.shape[2:], self.strides[-1], strict=True)]
        skips = self.encoder(pad_at_ends(image, size))
        maps = []
        for stage in range(1, self.feature_stage + 1):
            x, y, z = (n // s for n, s in zip(image.shape[2:], self.strides[stage], strict=True))
            maps.append(skips[stage][..., :x, :y, :z])
        return maps

    def hide(self, images: Tensor, ids_masked: Tensor) -> Tensor:
        """Set the voxels of masked tokens to 0 in images (N, C, X, Y, Z)."""
        x, y, z = (n // p for n, p in zip(images.shape[2:], self.token_size, strict=True))
        return images * visible_voxels(ids_masked, (x, y, z), self.token_size)

    def _token_features(self, skips: list[Tensor], images: Tensor) -> Tensor:
        """(N, L, D) features of all tokens."""
        gx, gy, gz = (n // p for n, p in zip(images.shape[2:], self.token_size, strict=True))
        return F.adaptive_avg_pool3d(skips[self.feature_stage], (gx, gy, gz)).flatten(2).transpose(1, 2)


def check_resenc(architecture: Mapping[str, Any], place: str = "") -> None:
    """Raise MiMError unless plans name nnU-Net's residual encoder U-Net; `place`, such as a file, begins its line."""
    before = f"{place}: " if place else ""
    name = str(architecture.get("network_class_name", "")).rsplit(".", 1)[-1]
    if name != CLASS_NAME:
        raise MiMError(
            f"{before}--encoder resenc: the plans name {name or 'no network'}, not {CLASS_NAME}: run "
            "nnUNetv2_plan_experiment -d DATASET -pl nnUNetPlannerResEncL, then mim_plan -d DATASET -p "
            "nnUNetResEncUNetLPlans --encoder resenc -o NAME, and pretrain with -p NAME"
        )
    check_named_classes(architecture, place)
    if any(step != 1 for step in architecture["arch_kwargs"]["strides"][0]):
        raise MiMError(
            f"{before}the first stride of {CLASS_NAME} must be 1 (mim_plan with --encoder resenc): plan it again"
        )


def check_named_classes(architecture: Mapping[str, Any], place: str = "", plain: bool = False) -> None:
    """Refuse a block of plans that names anything but nnU-Net's residual encoder U-Net and its layers of torch.nn.

    nnU-Net imports what plans name, and calls it with the arguments beside it: a file could run any function.

    Args:
        architecture: as in plans.
        place: the file that it stands in, which begins the message; empty: the caller names it.
        plain: allow nnU-Net's default network, PlainConvUNet, as well.

    Raises:
        MiMError: another name, or an argument that the network does not have.
    """
    kwargs, imported = architecture["arch_kwargs"], architecture["_kw_requires_import"]
    allowed = {name: {f"{m}.{c}" for m in MODULES for c in classes} for name, classes in NAMED_CLASSES.items()}
    arguments = {CLASS_PATH: ARGUMENTS, **({PLAIN_PATH: PLAIN_ARGUMENTS} if plain else {})}
    name = str(architecture["network_class_name"])
    wrong = [name] if name not in arguments else []
    wrong += [argument for argument in kwargs if argument not in arguments.get(name, kwargs)]
    wrong += [name for name in imported if name not in NAMED_CLASSES]
    wrong += [
        str(kwargs[name])
        for name, paths in allowed.items()
        if kwargs.get(name) is not None and str(kwargs[name]) not in paths
    ]
    if wrong:
        before, whole = f"{place}: " if place else "", "networks" if plain else CLASS_NAME
        raise MiMError(
            f"{before}the architecture names {ascii(wrong[0])[:80]}, which is no part of nnU-Net's {whole}: nothing "
            "was run; do not use this file, or plan the dataset again"
        )


def number_of_blocks(architecture: Mapping[str, Any]) -> int:
    """Blocks of the network that plans describe, of encoder and decoder."""
    kwargs = architecture["arch_kwargs"]
    stages = kwargs["n_stages"]
    counts = [kwargs[name] for name in ("n_blocks_per_stage", "n_conv_per_stage_decoder")]
    return stages + sum(stages * count if isinstance(count, int) else sum(map(abs, count)) for count in counts)


def check_view(architecture: Mapping[str, Any], view: Size3) -> None:
    """Raise MiMError unless the network's strides divide the view and leave more than one voxel for its norms."""
    deepest = cumulative_strides(architecture["arch_kwargs"]["strides"])[-1]
    if any(v % s for v, s in zip(view, deepest, strict=True)) or view == deepest:
        raise MiMError(
            f"--view {view} must be a multiple of {deepest}, the strides of the plans' {CLASS_NAME}, and "
            "larger (the plans' order of axes)"
        )


def fitting_view(architecture: Mapping[str, Any], view: Size3, token_size: Size3) -> Size3:
    """The largest view, if possible within `view`, that passes `check_view` and has even numbers of tokens."""
    deepest = cumulative_strides(architecture["arch_kwargs"]["strides"])[-1]
    steps = [math.lcm(2 * p, s) for p, s in zip(token_size, deepest, strict=True)]
    fits = [max(v // step, 1) * step for v, step in zip(view, steps, strict=True)]
    if tuple(fits) == deepest:
        smallest = steps.index(min(steps))
        fits[smallest] += steps[smallest]
    return tuple(fits)  # type: ignore[return-value]
