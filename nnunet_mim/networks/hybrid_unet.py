"""HybridUNet: the network that nnU-Net finetunes, with HybridEncoder, a full-resolution stem and a U-Net decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig, Size3
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import cumulative_strides
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.token_layout import pad_at_ends

N_ENCODER_STAGES = 4


class UNetAroundEncoder(nn.Module):
    """Base of what has all parts of a HybridUNet but its encoder: stem, skips, bottleneck and decoder."""

    def add_unet(
        self, input_channels: int, num_classes: int, embed_dims: Sequence[int], strides: Sequence[Size3],
        stem_features: int, decoder_features: Sequence[int], n_conv: int, deep_supervision: bool = False,
    ) -> None:  # fmt: skip
        """Add the parts with random weights. Arguments as in HybridUNet."""
        self.strides = list(strides)
        self.cumulative_strides = cumulative_strides(self.strides)
        n_bottlenecks = len(self.strides) - N_ENCODER_STAGES - 1
        features = [stem_features, *decoder_features, *[decoder_features[-1]] * n_bottlenecks]
        kernels = _kernel_sizes(self.strides)
        self.stem = ResidualBlock(input_channels, stem_features, kernels[0])
        self.skips = nn.ModuleList(
            _conv_norm_act(dim, width, (1, 1, 1)) for dim, width in zip(embed_dims, decoder_features, strict=True)
        )
        self.bottleneck = nn.ModuleList(
            ResidualBlock(features[level - 1], features[level], kernels[level], self.strides[level])
            for level in range(N_ENCODER_STAGES + 1, len(self.strides))
        )
        self.decoder = UNetDecoder(features, self.strides, num_classes, deep_supervision, n_conv)
        for part in (self.stem, self.skips, self.bottleneck, self.decoder):
            part.apply(_init_he)

    def decode(self, image: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Images (N, C, X, Y, Z) of whole tokens and the encoder's four maps (N, D, X, Y, Z) of them → outputs of the
        decoder.
        """
        features = [self.stem(image)]  # one map (N, D, X, Y, Z) per level
        features += [project(encoded) for project, encoded in zip(self.skips, maps, strict=True)]
        for down in self.bottleneck:
            features.append(down(features[-1]))
        return self.decoder(features)


class HybridUNet(UNetAroundEncoder):
    """Segmentation network around the pretrained encoder of MiM (arXiv 2404.15580).

    Level 0 is the stem at full resolution, levels 1-4 are the encoder's maps, and further levels are bottlenecks of
    strided convolutions. `encoder.*` is pretrained, and with `--decoder unet` all else but the heads. nnU-Net builds
    the network from the `arch_kwargs` of a plans file, which is why it takes more than eight arguments.

    Args:
        input_channels: image channels.
        num_classes: output channels, background included.
        deep_supervision: initial value of `decoder.deep_supervision`, which decides what `forward` returns.
        embed_dims, depths, num_heads, mlp_ratio, drop_path: as in HybridEncoder.
        strides: one triple per level: (1, 1, 1), the encoder's four, and those of the bottlenecks (often one).
        stem_features: channels at full resolution.
        decoder_features: channels of levels 1-4 in the decoder; None: `embed_dims`.
        n_conv_per_stage_decoder: convolutions after each concatenation.

    Raises:
        MiMError: sizes that do not fit together.
    """

    # nnU-Net's finetuning code reads these. Its "stem" is the pretrained input layer, which lies in the encoder.
    key_to_encoder = "encoder"
    key_to_stem = "encoder.stages.0.embed"
    keys_to_in_proj = ("encoder.stages.0.embed.proj",)
    key_to_lpe = None

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        *,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        strides: Sequence[Sequence[int]] = ((1, 1, 1),) + ((2, 2, 2),) * 5,
        drop_path: float = 0.0,
        stem_features: int = 32,
        decoder_features: Sequence[int] | None = None,
        n_conv_per_stage_decoder: int = 1,
    ) -> None:
        super().__init__()
        _check_strides(strides)
        decoder_features = list(embed_dims if decoder_features is None else decoder_features)
        if len(decoder_features) != N_ENCODER_STAGES:
            raise MiMError(f"decoder_features must be four numbers, one for each encoder stage, got {decoder_features}")
        triples: list[Size3] = [tuple(int(n) for n in stride) for stride in strides]  # type: ignore[misc]
        encoder_strides = tuple(triples[1 : N_ENCODER_STAGES + 1])
        network = NetworkConfig(tuple(embed_dims), tuple(depths), num_heads, mlp_ratio, encoder_strides)
        self.encoder = HybridEncoder(input_channels, network, drop_path)
        self.add_unet(
            input_channels, num_classes, embed_dims, triples, stem_features, decoder_features, n_conv_per_stage_decoder,
            deep_supervision,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Segment patches of any size.

        Args:
            x: (N, C, X, Y, Z).

        Returns:
            (N, classes, X, Y, Z) logits; with `decoder.deep_supervision` a list from high to low resolution, one for
            every level but the lowest, of size round(X / stride) as nnU-Net sizes its targets.
        """
        size = x.shape[2:]
        padded = self.padded_size(size)
        if padded != tuple(size):
            x = pad_at_ends(x, padded)
        outputs = self.decode(x, self.encoder.forward_features(x))
        if padded != tuple(size):
            outputs = [
                _crop(y, [max(1, round(n * (1 / s))) for n, s in zip(size, self.cumulative_strides[i], strict=True)])
                for i, y in enumerate(outputs)
            ]
        return outputs if self.decoder.deep_supervision else outputs[0]

    def padded_size(self, size: Sequence[int]) -> Size3:
        """Voxels per axis that the network runs on for patches of this size: multiples of the token size that leave at
        least two voxels at the lowest level, because instance normalisation of one is undefined.
        """
        padded = [math.ceil(n / p) * p for n, p in zip(size, self.encoder.token_size, strict=True)]
        lowest = self.cumulative_strides[-1]
        if all(n <= s for n, s in zip(padded, lowest, strict=True)):
            padded[2] = math.ceil((lowest[2] + 1) / self.encoder.token_size[2]) * self.encoder.token_size[2]
        return tuple(padded)  # type: ignore[return-value]


class UNetDecoder(nn.Module):
    """Decoder of a U-Net (arXiv 1505.04597) with a 1x1x1 head at every level but the lowest."""

    def __init__(
        self, features: Sequence[int], strides: Sequence[Size3], num_classes: int, deep_supervision: bool, n_conv: int
    ) -> None:
        super().__init__()
        kernels = _kernel_sizes(strides)
        self.deep_supervision = deep_supervision
        self.up, self.blocks, self.heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(features[:-1]):
            self.up.append(nn.ConvTranspose3d(features[level + 1], width, strides[level + 1], strides[level + 1]))
            convs = [_conv_norm_act(width if i else 2 * width, width, kernels[level]) for i in range(n_conv)]
            self.blocks.append(nn.Sequential(*convs))
            self.heads.append(nn.Conv3d(width, num_classes, 1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps of all levels, from high to low resolution → (N, classes, X, Y, Z) logits in the same order.

        Without deep supervision there are only the logits of full resolution.
        """
        x = features[-1]
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.blocks))):
            x = _crop(self.up[level](x), features[level].shape[2:])
            x = self.blocks[level](torch.cat([x, features[level]], dim=1))
            if self.deep_supervision or level == 0:
                outputs.insert(0, self.heads[level](x))
        return outputs


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (arXiv 1512.03385); with a stride the output size is rounded up."""

    def __init__(self, in_channels: int, channels: int, kernel: Size3, stride: Size3 = (1, 1, 1)) -> None:
        super().__init__()
        self.conv1 = _conv_norm_act(in_channels, channels, kernel, stride)
        self.conv2 = nn.Sequential(*_conv_norm_act(channels, channels, kernel)[:2])
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels or stride != (1, 1, 1):
            self.shortcut = nn.Sequential(*_conv_norm_act(in_channels, channels, (1, 1, 1), stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.shortcut(x), 0.01)


def _conv_norm_act(in_channels: int, channels: int, kernel: Size3, stride: Size3 = (1, 1, 1)) -> nn.Sequential:
    """nnU-Net's convolution → InstanceNorm → LeakyReLU; the size is divided by the stride and rounded up."""
    padding = tuple(k // 2 for k in kernel)
    return nn.Sequential(
        nn.Conv3d(in_channels, channels, kernel, stride, padding, bias=False),  # type: ignore[arg-type]
        nn.InstanceNorm3d(channels, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )


def _kernel_sizes(strides: Sequence[Sequence[int]]) -> list[Size3]:
    """Kernel size of each level: 3, but 1 along an axis that no stride up to the next level downsamples.

    That is the axis of thick slices while the others catch up, as in nnU-Net. Where this holds of all axes, as in a
    network that never downsamples, the kernel is 3.
    """
    kernels: list[Size3] = []
    for level in range(len(strides)):
        untouched = [all(stride[axis] == 1 for stride in strides[: level + 2]) for axis in range(3)]
        kernels.append(tuple(1 if u and not all(untouched) else 3 for u in untouched))  # type: ignore[arg-type]
    return kernels


def plans_architecture(
    network: NetworkConfig, patch_size: Sequence[int], widths: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make the `architecture` block of a nnU-Net plans file, plain JSON.

    Args:
        network: sizes of the encoder; the decoder's belong to pretraining and are not used.
        patch_size: voxels per axis; decides which axes have room for a bottleneck below the token grid.
        widths: `stem_features`, `decoder_features`, `n_conv_per_stage_decoder` where they are not those of the encoder.
    """
    tokens = [math.ceil(n / p) for n, p in zip(patch_size, network.token_size, strict=True)]
    bottleneck = [2 if n >= 4 else 1 for n in tokens]
    strides = [[1, 1, 1], *[list(stride) for stride in network.strides]]
    return {
        "network_class_name": f"{HybridUNet.__module__}.{HybridUNet.__name__}",
        "arch_kwargs": {
            "embed_dims": list(network.embed_dims),
            "depths": list(network.depths),
            "num_heads": network.num_heads,
            "mlp_ratio": network.mlp_ratio,
            "strides": [*strides, bottleneck] if max(bottleneck) > 1 else strides,
            "stem_features": max(16, min(32, network.embed_dims[0] * 2 // 3)),
            "decoder_features": list(network.embed_dims),
            "n_conv_per_stage_decoder": 1,
            **(widths or {}),
        },
        "_kw_requires_import": [],
    }


def _check_strides(strides: Sequence[Sequence[int]]) -> None:
    if len(strides) < N_ENCODER_STAGES + 1 or any(len(stride) != 3 for stride in strides):
        raise MiMError(f"HybridUNet is 3-D and needs five strides or more (full size, four stages), got {strides}")
    if tuple(strides[0]) != (1, 1, 1):
        raise MiMError(f"the first stride of HybridUNet is full resolution and must be (1, 1, 1), got {strides[0]}")


def _crop(x: Tensor, size: Sequence[int]) -> Tensor:
    return x[..., : size[0], : size[1], : size[2]]


def _init_he(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
