"""Classifier: an encoder, and for every target a head that attends over the tokens of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from nnunet_mim.config import Size3


class Encoder(Protocol):
    """A module that gives maps of whole patches, as HybridEncoder and ResEncMaskInMask do."""

    token_size: Size3

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """(N, C, X, Y, Z) of whole tokens → maps (N, D, X, Y, Z), from high to low resolution."""


def place_weights(counts: Tensor, size: Sequence[int]) -> Tensor:
    """Share of each place of a map of this size (gx, gy, gz) that counts: (N, X, Y, Z) bool → (N, gx, gy, gz)."""
    return F.adaptive_avg_pool3d(counts[:, None].float(), (size[0], size[1], size[2]))[:, 0]


class AttentionPool(nn.Module):
    """Weighted mean of tokens of `dim` channels, whose weights a learned query decides (arXiv 1802.04712)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scores = nn.Linear(dim, 1)
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
        scores = self.scores(tokens)[..., 0] + weights.clamp(min=1e-12).log()  # (N, L)
        return torch.einsum("nl,nld->nd", scores.masked_fill(weights == 0, -torch.inf).softmax(dim=1), tokens)


class LinearHead(nn.Module):
    """A linear layer on features that are standardised by fixed numbers; logits are 0 at the start."""

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.linear = nn.Linear(dim, n_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) → (N, K)."""
        logits: Tensor = self.linear((features - self.mean) / self.scale)
        return logits


def by_case(tokens: Tensor, weights: Tensor, n_windows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Join the windows of each case.

    Args:
        tokens: (M, L, D) of all windows, case by case.
        weights: (M, L, 2).
        n_windows: of each of N cases, M in sum.

    Returns:
        (N, W * L, D) tokens and (N, W * L, 2) weights for the largest number of windows W, 0 where a case has fewer.
    """
    parts = zip(tokens.split(list(n_windows)), weights.split(list(n_windows)), strict=True)
    joined = [(part.flatten(0, 1), weight.flatten(0, 1)) for part, weight in parts]
    padded = [pad_sequence([pair[i] for pair in joined], batch_first=True) for i in range(2)]
    return padded[0], padded[1]


class Classifier(nn.Module):
    """An encoder, and per target attention over the tokens of the box, over those of the mask, and a linear layer.

    A token holds the encoder's last map, of each earlier map the mean over the token's part of the mask, and the cube
    root of the share of it that lies in the mask: a lesion may be much smaller than a token.

    Args:
        encoder: with its weights.
        dims: channels of its maps.
        n_classes: per target.
    """

    def __init__(self, encoder: Encoder, dims: Sequence[int], n_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder: Encoder = encoder
        self.targets = tuple(n_classes)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        dim = sum(dims) + 1
        self.pools = nn.ModuleList(nn.ModuleList([AttentionPool(dim), AttentionPool(dim)]) for _ in n_classes)
        self.heads = nn.ModuleList(LinearHead(2 * dim, n) for n in n_classes.values())

    def forward(self, images: Tensor, places: Tensor, n_windows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Classify cases.

        Args:
            images: (M, C, X, Y, Z) windows of whole tokens, case by case, as `Region.network_input`.
            places: (M, 2, X, Y, Z) bool, as `Region.places`.
            n_windows: of each of N cases, M in sum; None: one window each.

        Returns:
            (N, classes) logits per target.
        """
        tokens, weights = self.tokens(images, places)
        return self.classify(*by_case(tokens, weights, n_windows or [1] * len(images)))

    def tokens(self, images: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(M, L, D) tokens of windows, and (M, L, 2) their shares in the box and in the mask.

        For cases of several windows join them with `by_case`, and give both to `classify`.
        """
        *maps, last = self.encoder.forward_features(images)
        counts, mask = places.unbind(dim=1)
        gx, gy, gz = last.shape[2:]
        size, parts = (gx, gy, gz), []
        for features in maps:
            inside = place_weights(mask, features.shape[2:])[:, None]  # (M, 1, x, y, z)
            share = F.adaptive_avg_pool3d(inside, size).clamp(min=1e-6)
            parts.append(F.adaptive_avg_pool3d(features * inside, size) / share)
        normed = [
            norm(part.flatten(2).transpose(1, 2)) for norm, part in zip(self.norms, [*parts, last], strict=True)
        ]
        weights = torch.stack([place_weights(each, size).flatten(1) for each in (counts, mask)], dim=-1)  # (M, L, 2)
        return torch.cat([*normed, weights[..., 1:] ** (1 / 3)], dim=-1), weights

    def classify(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """(N, L, D) tokens and (N, L, 2) weights → (N, classes) logits per target."""
        pooled = self.pooled(tokens, weights)
        return {name: head(pooled[name]) for name, head in zip(self.targets, self.heads, strict=True)}

    def pooled(self, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """(N, L, D) tokens and (N, L, 2) weights → (N, 2 D) features per target.

        The box stands for the mask of a case in whose windows there is none.
        """
        box, mask = weights.unbind(dim=-1)
        mask = torch.where(mask.sum(dim=1, keepdim=True) > 0, mask, box)
        features = {}
        for name, pools in zip(self.targets, self.pools, strict=True):
            both = [pools[0](tokens, box), pools[1](tokens, mask)]  # type: ignore[index]
            features[name] = torch.cat(both, dim=-1)
        return features
