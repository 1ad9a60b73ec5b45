"""MaskInMask: the network of MiM pretraining (arXiv 2404.15580), one level at a time.

A crop is seen at up to three levels: a wide view, views cut from its masked regions, and views cut from the masked
tokens (or regions) of those: a mask in a mask. Each view is reconstructed from its visible tokens. The decoder's
features of a child view must agree with those of the masked place in the parent that the child was cut from.
`pretraining/objective/views.py` cuts the views, `pretraining/objective/losses.py` holds the losses.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nnunet_mim.config import NetworkConfig
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.mim_decoder import MiMDecoder
from nnunet_mim.networks.token_layout import take_tokens
from nnunet_mim.networks.vit_blocks import MLP


class LevelOutput(NamedTuple):
    """Outputs of a network of pretraining for the N views of one level."""

    prediction: Tensor
    """(N, M, P) normalised voxels of the masked tokens, in the order of `ids_masked`; P = voxels times channels"""
    features: Tensor
    """(N, L, D) features of all tokens, in raster order"""
    child: Tensor | None
    """(N, D) projected mean feature of each view; None without an edge to a parent level"""
    parent: Tensor | None
    """(places, D) detached features of the parents' places, projected for `infonce`, raw for `cosine`"""


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
        """Project what alignment compares: `LevelOutput.child` and `.parent`, or twice None without alignment.

        Args:
            features: (N, L, D) features of the children.
            edge, parent_features: as in `MaskInMask.forward`.
        """
        if edge is None or parent_features is None or self.alignment == "none":
            return None, None
        child = self.projectors.get_submodule(f"child.{edge}")(features.mean(dim=1))
        parent = parent_features.detach()
        if self.alignment == "infonce":
            parent = self.projectors.get_submodule(f"parent.{edge}")(parent)
        return child, parent


class MaskInMask(Alignment):
    """Encoder, decoder and projectors of MiM (arXiv 2404.15580).

    Args:
        network: sizes of encoder and decoder.
        in_channels: image channels.
        n_edges: pairs of adjacent levels in a full ladder; a skipped level leaves the projectors of its edge unused.
        alignment: `infonce` (child and parent each through a projector), `cosine` (only the child) or `none`.
    """

    def __init__(
        self, network: NetworkConfig, in_channels: int = 1, n_edges: int = 2, alignment: str = "infonce"
    ) -> None:
        super().__init__()
        self.encoder = HybridEncoder(in_channels, network)
        self.decoder = MiMDecoder(in_channels, network)
        self.add_projectors(network.decoder_embed_dim, n_edges, alignment)

    def forward(
        self,
        images: Tensor,
        ids_keep: Tensor,
        ids_masked: Tensor,
        edge: int | None = None,
        parent_features: Tensor | None = None,
        recompute: bool = False,
    ) -> LevelOutput:
        """Reconstruct the masked tokens of the views of one level, and project what alignment compares.

        Args:
            images: (N, C, X, Y, Z) float, views.
            ids_keep, ids_masked: (N, K) and (N, M) int64, raster numbers of the visible and of the masked tokens.
            edge: number of the edge to the parent level, or None.
            parent_features: (places, D) mean decoder features of every place of every parent; they get no gradient.
            recompute: keep no activations of blocks, compute them again in the backward pass: less memory, a third
                more time.
        """
        latent = self.encoder(images, ids_keep, recompute)  # (N, K, D_encoder)
        features = self.decoder(latent, ids_keep, self.encoder.grid(images), recompute)  # (N, L, D)
        prediction = self.decoder.head(take_tokens(features, ids_masked))  # (N, M, P): the others have no loss
        child, parent = self.align(features, edge, parent_features)
        return LevelOutput(prediction, features, child, parent)

    @property
    def feature_source(self) -> HybridEncoder:
        """The module whose `forward_features` a label probe reads."""
        return self.encoder

    def visible_features(self, images: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Features of the visible tokens, (N, K, D), from the encoder."""
        return self.encoder(images, ids_keep)
