"""Classifier: an encoder, and for every target a head that attends over the tokens of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.config import Size3
from nnunet_mim.networks.hybrid_encoder import HybridEncoder


class Encoder(Protocol):
    """A module that gives maps of whole patches, as HybridEncoder and ResEncMaskInMask do."""

    token_size: Size3

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, C, X, Y, Z) of whole tokens → maps (N, D, X, Y, Z), from high to low resolution."""


def place_weights(counts: Tensor, size: Sequence[int]) -> Tensor:
    """Share of each place of a map of this size (gx, gy, gz) that counts: (N, X, Y, Z) bool → (N, gx, gy, gz)."""
    return F.adaptive_avg_pool3d(counts[:, None].float(), (size[0], size[1], size[2]))[:, 0]


class AttentionPool(nn.Module):
    """Weighted mean of tokens, whose weights one learned query per head decides (arXiv 1802.04712, multi-head).

    Args:
        dim: channels of a token.
        num_heads: parts of the channels with weights of their own.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.scores = nn.Linear(dim, num_heads)
        self.values = nn.Linear(dim, dim)
        nn.init.zeros_(self.scores.weight)  # a mean over all places at the start
        nn.init.zeros_(self.scores.bias)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Pool tokens.

        Args:
            tokens: (N, L, D).
            weights: (N, L) share of each token that counts; 0: it is ignored. Some token has to count.

        Returns:
            (N, D).
        """
        N, L, D = tokens.shape
        tokens = self.norm(tokens)
        scores = self.scores(tokens) + weights.clamp(min=1e-12).log()[..., None]  # (N, L, heads)
        scores = scores.masked_fill(weights[..., None] == 0, -torch.inf)
        values = self.values(tokens).reshape(N, L, scores.shape[-1], -1)  # (N, L, heads, D / heads)
        return torch.einsum("nlh,nlhd->nhd", scores.softmax(dim=1), values).reshape(N, D)


class Classifier(nn.Module):
    """An encoder with attention pooling, and a linear layer per target.

    Args:
        encoder: with its weights.
        dim: channels of its last map.
        n_classes: per target.
        num_heads: of the pooling.
        dropout: of the pooled features.
    """

    def __init__(
        self, encoder: Encoder, dim: int, n_classes: Mapping[str, int], num_heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder
        self.targets = tuple(n_classes)
        self.pools = nn.ModuleList(AttentionPool(dim, num_heads) for _ in n_classes)
        self.heads = nn.ModuleList(nn.Linear(dim, n) for n in n_classes.values())
        self.dropout = nn.Dropout(dropout)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Classify windows, one by one.

        Args:
            images: (N, C, X, Y, Z) of whole tokens, as `Region.network_input`.
            counts: (N, X, Y, Z) bool, `Region.counts`.

        Returns:
            (N, classes) logits per target.
        """
        return self.classify(*self.tokens(images, counts))

    def tokens(self, images: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L, D) tokens of windows and (N, L) their weights.

        For a case of several windows reshape both to (1, windows * L, …) and give them to `classify`.
        """
        features: Tensor = self.encoder.forward_features(images)[-1]
        weights = place_weights(counts, features.shape[2:])
        return features.flatten(2).transpose(1, 2), weights.flatten(1)

    def classify(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """(N, L, D) tokens and (N, L) weights → (N, classes) logits per target."""
        logits = {}
        for target, pool, head in zip(self.targets, self.pools, self.heads, strict=True):
            logits[target] = head(self.dropout(pool(tokens, weights)))
        return logits


@torch.no_grad()
def with_mask_channel(encoder: HybridEncoder) -> HybridEncoder:
    """A copy of an encoder that takes one more input channel, the mask, whose weights are 0: it computes the same."""
    wider = HybridEncoder(encoder.in_channels + 1, encoder.config)
    state = encoder.state_dict()
    name = "stages.0.embed.proj.weight"
    state[name] = torch.cat([state[name], torch.zeros_like(state[name][:, :1])], dim=1)
    wider.load_state_dict(state)
    return wider
