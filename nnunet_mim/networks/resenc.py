"""nnU-Net's residual encoder U-Net behind the interface of MaskInMask: for users of the strongest CNN.

A convolution cannot leave masked tokens out as a transformer does, so they are set to 0 in the input (0 HU in the wide
window), and the whole U-Net reconstructs. Its weights keep the names that they have in nnU-Net's network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor

from nnunet_mim.config import Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.mask_in_mask import Alignment, LevelOutput, build_projectors
from nnunet_mim.networks.token_layout import tokens_from_grid

CLASS_NAME = "ResidualEncoderUNet"


class ResEncMaskInMask(Alignment):
    """A ResidualEncoderUNet that reconstructs, and projectors.

    The features of a token, which alignment compares, are the encoder's at the deepest level that is not coarser than
    the grid of tokens, averaged over the token.

    Args:
        architecture: of nnU-Net's plans: `network_class_name`, `arch_kwargs`, `_kw_requires_import`.
        token_size: voxels per axis; a product of the network's first strides.
        in_channels: image channels.
        n_edges, alignment: as in MaskInMask.

    Raises:
        MiMError: the plans name another network.
    """

    def __init__(
        self, architecture: Mapping[str, Any], token_size: Size3, in_channels: int = 1, n_edges: int = 2,
        alignment: str = "infonce",
    ) -> None:  # fmt: skip
        check_resenc(architecture)
        kwargs = architecture["arch_kwargs"]
        steps = cumulative_strides(kwargs["strides"])
        super().__init__()
        fine_enough = [all(s <= t for s, t in zip(step, token_size, strict=True)) for step in steps]
        unet = get_network_from_plans(
            architecture["network_class_name"], kwargs, architecture["_kw_requires_import"], in_channels, in_channels,
            allow_init=True, deep_supervision=False,
        )  # fmt: skip
        self.encoder, self.decoder = unet.encoder, unet.decoder
        self.token_size = token_size
        self.strides = steps
        self.feature_stage = max(i for i, fine in enumerate(fine_enough) if fine)
        self.alignment = alignment
        self.projectors = build_projectors(kwargs["features_per_stage"][self.feature_stage], n_edges, alignment)

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor,
        ids_masked: Tensor,
        edge: int | None = None,
        parent_features: Tensor | None = None,
        recompute: bool = False,
    ) -> LevelOutput:
        """As MaskInMask's; `recompute` is not supported."""
        skips = self.encoder(self.hide(images, ids_masked))
        image = self.decoder(skips)
        rows = torch.arange(images.shape[0], device=images.device)[:, None]
        tokens = tokens_from_grid(image.permute(0, 2, 3, 4, 1), self.token_size)
        features = self._token_features(skips, images)
        child, parent = self.align(features, edge, parent_features)
        return LevelOutput(tokens[rows, ids_masked].flatten(2), features, child, parent)

    def visible_features(self, images: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """As MaskInMask's."""
        features = self._token_features(self.encoder(self.hide(images, ids_masked)), images)
        return features[torch.arange(images.shape[0], device=images.device)[:, None], ids_keep]

    @property
    def feature_source(self) -> ResEncMaskInMask:
        """What has `forward_features`."""
        return self

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """Maps of an image with nothing masked, high → low resolution, from half resolution to that of the features.

        Args:
            image: (N, C, X, Y, Z), whole tokens; padded here at the far ends to what the network can halve.
        """
        size = [-(-n // s) * s for n, s in zip(image.shape[2:], self.strides[-1], strict=True)]
        padding = [n for a in (2, 1, 0) for n in (0, size[a] - image.shape[2 + a])]
        skips = self.encoder(F.pad(image, padding, mode="replicate"))
        maps = []
        for stage in range(1, self.feature_stage + 1):
            x, y, z = (n // s for n, s in zip(image.shape[2:], self.strides[stage], strict=True))
            maps.append(skips[stage][..., :x, :y, :z])
        return maps

    def hide(self, images: Tensor, ids_masked: Tensor) -> Tensor:
        """Images with 0 in the voxels of masked tokens.

        Args:
            images: (N, C, X, Y, Z).
            ids_masked: (N, M) raster numbers.
        """
        grid = [size // p for size, p in zip(images.shape[2:], self.token_size, strict=True)]
        keep = images.new_ones(images.shape[0], math.prod(grid)).scatter_(1, ids_masked, 0).view(-1, 1, *grid)
        for axis, p in enumerate(self.token_size):
            keep = keep.repeat_interleave(p, dim=2 + axis)
        return images * keep

    def _token_features(self, skips: list[Tensor], images: Tensor) -> Tensor:
        x, y, z = (size // p for size, p in zip(images.shape[2:], self.token_size, strict=True))
        return F.adaptive_avg_pool3d(skips[self.feature_stage], (x, y, z)).flatten(2).transpose(1, 2)


def check_resenc(architecture: Mapping[str, Any]) -> None:
    """Raise MiMError unless plans name nnU-Net's residual encoder U-Net."""
    name = architecture.get("network_class_name", "").rsplit(".", 1)[-1]
    if name != CLASS_NAME:
        raise MiMError(
            f"--encoder resenc: the plans name {name or 'no network'}, not {CLASS_NAME}: run nnUNetv2_plan_experiment "
            "-d DATASET -pl nnUNetPlannerResEncL, then mim_plan -d DATASET -p nnUNetResEncUNetLPlans --encoder resenc "
            "-o NAME, and pretrain with -p NAME"
        )


def check_view(architecture: Mapping[str, Any], view: Size3) -> None:
    """Raise MiMError unless the network can halve a view of this size as often as it wants to, and has more than one
    voxel then, which its norms need.
    """
    least = cumulative_strides(architecture["arch_kwargs"]["strides"])[-1]
    if any(v % s for v, s in zip(view, least, strict=True)) or view == least:
        raise MiMError(
            f"--view {view} must be a multiple of {least}, the strides of the plans' {CLASS_NAME}, and larger"
        )


def fitting_view(architecture: Mapping[str, Any], view: Size3, token_size: Size3) -> Size3:
    """The largest view, no larger than this one if possible, that suits the network (`check_view`) and whose tokens are
    even in number on every axis.

    Args:
        architecture: of the plans.
        view: voxels.
        token_size: voxels.
    """
    deepest = cumulative_strides(architecture["arch_kwargs"]["strides"])[-1]
    steps = [math.lcm(2 * p, s) for p, s in zip(token_size, deepest, strict=True)]
    fits = [max(v // step, 1) * step for v, step in zip(view, steps, strict=True)]
    if tuple(fits) == deepest:
        smallest = steps.index(min(steps))
        fits[smallest] += steps[smallest]
    return tuple(fits)  # type: ignore[return-value]


def cumulative_strides(strides: list) -> list[Size3]:
    """Voxels of the image per voxel of each stage's map."""
    return [tuple(math.prod(s[axis] for s in strides[: i + 1]) for axis in range(3)) for i in range(len(strides))]  # type: ignore[misc]
