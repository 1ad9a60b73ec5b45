"""A network on whole cases: its logits over all windows, and a map of what they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_mim.classification.encoders import LoadedEncoder
from nnunet_mim.classification.network import Classifier
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseVoxels, Region, cut_regions
from nnunet_mim.config import Size3
from nnunet_mim.networks.hybrid_encoder import HybridEncoder

WINDOWS_AT_ONCE = 8
MAX_HEADS = 4


def new_classifier(encoder: LoadedEncoder, classes: Mapping[str, Sequence[str]], seed: int = 0) -> Classifier:
    """An encoder (the object itself) with fresh pooling and heads.

    Args:
        encoder: with all input channels.
        classes: by target.
        seed: of the weights of the pooling.
    """
    heads = next(n for n in range(MAX_HEADS, 0, -1) if encoder.dim % n == 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(encoder.module, encoder.dim, {name: len(each) for name, each in classes.items()}, heads)


@dataclass(frozen=True)
class CaseNetwork:
    """A classifier, and how cases are cut for it."""

    model: Classifier
    config: ClassifyConfig
    cell: Size3
    """voxels per axis that windows are multiples of"""
    device: torch.device

    def regions(self, case: CaseVoxels) -> list[Region]:
        """The windows that cover a case, all of the size that the network was trained with."""
        return cut_regions(case, self.config.margin, self.config.window, self.cell, one_size=True)

    @torch.no_grad()
    def logits(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, (K,) logits in float32 over all windows of a case."""
        self.model.eval()
        regions = self.regions(case)
        parts = []
        for first in range(0, len(regions), WINDOWS_AT_ONCE):
            parts.append(self.model.tokens(*self._tensors(regions[first : first + WINDOWS_AT_ONCE])))
        tokens, weights = (torch.cat([part[i] for part in parts]) for i in range(2))  # (W, L, D), (W, L)
        logits = self.model.classify(tokens.flatten(0, 1)[None], weights.flatten()[None])
        return {target: value[0].float().cpu().numpy() for target, value in logits.items()}

    def saliency(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, a map (X, Y, Z) float32 of what speaks for its last class (above 0) and against it (below).

        It is gradient times activation of the first map after the input's resolution (HiResCAM, arXiv 2011.08891), of
        the logit minus the mean of the others, as trilinear interpolation; windows that overlap are averaged. Each
        window is pooled by itself.
        """
        self.model.eval()
        total = {target: np.zeros(case.shape, np.float32) for target in self.model.targets}
        times = np.zeros(case.shape, np.float32)
        for region in self.regions(case):
            if not region.counts.any():
                continue
            here, there = _overlap(region, case.shape)
            times[here] += 1
            for target, saliency in self._window_saliency(region).items():
                total[target][here] += saliency[there]
        return {target: value / np.maximum(times, 1) for target, value in total.items()}

    def _window_saliency(self, region: Region) -> dict[str, np.ndarray]:
        images, counts = self._tensors([region])
        with early_map(self.model.encoder) as found:  # type: ignore[arg-type]
            logits = self.model(images, counts)
        activation = found[0]
        maps = {}
        for target, values in logits.items():
            score = values[0, -1] - values[0, :-1].mean()
            (gradient,) = torch.autograd.grad(score, activation, retain_graph=True)
            product = gradient * activation
            if isinstance(self.model.encoder, HybridEncoder):
                product = product[:, 0].movedim(-1, 1)  # (1, 1, X, Y, Z, C) → (1, C, X, Y, Z)
            summed = product.sum(dim=1, keepdim=True)
            whole = F.interpolate(summed, size=images.shape[2:], mode="trilinear")
            maps[target] = whole[0, 0].detach().float().cpu().numpy()
        return maps

    def _tensors(self, regions: Sequence[Region]) -> tuple[Tensor, Tensor]:
        """(M, C, X, Y, Z) images and (M, X, Y, Z) counts of windows."""
        images = np.stack([region.network_input(self.config.mask_channel) for region in regions])
        counts = np.stack([region.counts for region in regions])
        return torch.from_numpy(images).to(self.device), torch.from_numpy(counts).to(self.device)


@contextmanager
def early_map(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """While entered, the map of the first stage below the input's resolution is added to the list at every forward.

    Of a HybridEncoder it has the shape (N, 1, X, Y, Z, C), else (N, C, X, Y, Z).
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hybrid = isinstance(encoder, HybridEncoder)
    stage = encoder.stages[0] if hybrid else encoder.encoder.stages[1]  # type: ignore[index, union-attr]
    handle = stage.register_forward_hook(keep)  # type: ignore[union-attr, operator]
    try:
        yield found
    finally:
        handle.remove()


def _overlap(region: Region, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels that a window and its case share: in the case, and in the window."""
    here, there = [], []
    for start, size, n in zip(region.start, region.counts.shape, shape, strict=True):
        low, high = max(start, 0), min(start + size, n)
        here.append(slice(low, high))
        there.append(slice(low - start, high - start))
    return tuple(here), tuple(there)
