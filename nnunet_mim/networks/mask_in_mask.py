"""MaskInMask: the network of MiM pretraining (arXiv 2404.15580), for the views of one level or of all levels at once.

A crop is seen at up to three levels: a wide view, views cut from its masked regions, and views cut from the masked
tokens (or regions) of those: a mask in a mask. Each view is reconstructed from its visible tokens. The decoder's
features of a child view must agree with those of the masked place in the parent that the child was cut from.
`pretraining/objective/views.py` cuts the views, `pretraining/objective/losses.py` holds the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.masked_unet import MaskedUNet
from nnunet_mim.networks.mim_decoder import MiMDecoder
from nnunet_mim.networks.token_layout import join, take_tokens, tokens_from_grid
from nnunet_mim.networks.vit_blocks import MLP


class MaskedViews(NamedTuple):
    """Views of one level, or some of them, and what is masked in them."""

    images: Tensor
    """(N, C, X, Y, Z) float; views of one pass have the same size"""
    ids_keep: Tensor
    """(N, K) int64, raster numbers of the visible tokens"""
    ids_masked: Tensor
    """(N, M) int64, raster numbers of the masked tokens"""


class Reconstruction(NamedTuple):
    """What a network of pretraining makes of MaskedViews."""

    prediction: Tensor
    """(N, M, P) normalised voxels of the masked tokens, in the order of `ids_masked`; P = voxels times channels"""
    features: Tensor
    """(N, L, D) features of all tokens, in raster order"""


class Reconstructs(Protocol):
    """A network of pretraining, or what calls one: see `MaskInMask.forward` and `Alignment.align`."""

    def __call__(self, groups: Sequence[MaskedViews], recompute: bool = False) -> list[Reconstruction]: ...

    def align(
        self, features: Tensor, edge: int | None, parent_features: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]: ...


class HasUNet(Protocol):
    """A network of pretraining with the U-Net of finetuning, or what calls one."""

    def reconstruct_with_unet(self, groups: Sequence[MaskedViews]) -> list[Tensor]: ...


class Alignment(nn.Module):
    """Base of both networks of pretraining: the projectors of MiM's alignment of levels (arXiv 2404.15580)."""

    def add_projectors(self, dim: int, n_edges: int, alignment: str) -> None:
        """Add the projectors of features of `dim` channels that this kind of alignment needs, one per edge."""
        self.alignment = alignment
        n_child, n_parent = n_edges * (alignment != "none"), n_edges * (alignment == "infonce")
        self.projectors = nn.ModuleDict(
            {
                "child": nn.ModuleList(MLP(dim, dim) for _ in range(n_child)),
                "parent": nn.ModuleList(MLP(dim, dim) for _ in range(n_parent)),
            }
        )

    def align(
        self, features: Tensor, edge: int | None, parent_features: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Project what alignment compares.

        Args:
            features: (N, L, D) features of the children.
            edge: number of the edge to the parent level, or None.
            parent_features: (places, D) mean features of every place of every parent; they get no gradient.

        Returns:
            (N, D) projected mean feature of each child; and (places, D) features of the parents' places, projected for
            `infonce`, raw for `cosine`. Twice None without an edge or without alignment.
        """
        if edge is None or parent_features is None or self.alignment == "none":
            return None, None
        child = self.projectors.get_submodule(f"child.{edge}")(features.mean(dim=1))
        parent = parent_features.detach()
        if self.alignment == "infonce":
            parent = self.projectors.get_submodule(f"parent.{edge}")(parent)
        return child, parent


class MaskInMask(Alignment):
    """Encoder, decoder and projectors of MiM (arXiv 2404.15580), and the U-Net of finetuning where that learns too.

    Args:
        network: sizes of encoder and decoder.
        in_channels: image channels.
        n_edges: pairs of adjacent levels in a full ladder; a skipped level leaves the projectors of its edge unused.
        alignment: `infonce` (child and parent each through a projector), `cosine` (only the child) or `none`.
        unet: `arch_kwargs` of a HybridUNet around the encoder, which reconstructs too; None: there is none.
    """

    def __init__(
        self, network: NetworkConfig, in_channels: int = 1, n_edges: int = 2, alignment: str = "infonce",
        unet: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = HybridEncoder(in_channels, network)
        self.decoder = MiMDecoder(in_channels, network)
        self.add_projectors(network.decoder_embed_dim, n_edges, alignment)
        self.unet = MaskedUNet(in_channels, unet) if unet is not None else None

    def forward(self, groups: Sequence[MaskedViews], recompute: bool = False) -> list[Reconstruction]:
        """Reconstruct the masked tokens of groups of views, all at once: views do not see each other.

        Args:
            groups: views of several levels, or of one.
            recompute: keep no activations of blocks, compute them again in the backward pass: less memory, a third
                more time.
        """
        ids_keep = [group.ids_keep for group in groups]
        latent = self.encoder.encode_groups([group.images for group in groups], ids_keep, recompute)  # (T, D_encoder)
        grid = self.encoder.grid(groups[0].images)
        features = self.decoder.decode_groups(latent, ids_keep, grid, recompute)  # (sum of N, L, D)
        parts = features.split([len(ids) for ids in ids_keep])
        masked = [take_tokens(part, group.ids_masked) for part, group in zip(parts, groups, strict=True)]  # (N, M, D)
        voxels = self.decoder.head(join([tokens.flatten(0, 1) for tokens in masked]))  # the others have no loss
        predictions = voxels.split([tokens.shape[0] * tokens.shape[1] for tokens in masked])
        return [
            Reconstruction(prediction.unflatten(0, tokens.shape[:2]), part)
            for prediction, tokens, part in zip(predictions, masked, parts, strict=True)
        ]

    def reconstruct_with_unet(self, groups: Sequence[MaskedViews]) -> list[Tensor]:
        """Reconstruct the masked tokens of groups of views with the U-Net around the encoder.

        Returns:
            for each group (N, M, P), as `Reconstruction.prediction`.
        """
        assert self.unet is not None
        images, ids_keep, ids_masked = zip(*groups, strict=True)
        latent, maps = self.encoder.encode_maps(images, ids_keep)  # (T, D), three of (T, X, Y, Z, C)
        image = self.unet(images, ids_keep, ids_masked, [*maps, latent[:, None, None, None]]).permute(0, 2, 3, 4, 1)
        tokens = tokens_from_grid(image, self.encoder.token_size).split([len(ids) for ids in ids_keep])
        return [take_tokens(own, ids).flatten(2) for own, ids in zip(tokens, ids_masked, strict=True)]

    @property
    def feature_source(self) -> HybridEncoder:
        """The module whose `forward_features` a label probe reads."""
        return self.encoder

    def visible_features(self, images: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Features of the visible tokens, (N, K, D), from the encoder."""
        return self.encoder(images, ids_keep)
