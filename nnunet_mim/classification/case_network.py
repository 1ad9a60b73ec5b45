"""A network on whole cases: its logits over all windows, and a map of what they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_mim.classification.encoders import LoadedEncoder
from nnunet_mim.classification.network import Classifier, by_case
from nnunet_mim.classification.options import ClassifyConfig
from nnunet_mim.classification.regions import CaseVoxels, Region, cut_regions
from nnunet_mim.config import Size3

WINDOWS_AT_ONCE = 8
STEPS = 8
"""of the integral in a map of saliency"""
SMOOTHING = 1.0
"""deviation (voxels) of the Gaussian that smooths it"""


def new_classifier(encoder: LoadedEncoder, classes: Mapping[str, Sequence[str]]) -> Classifier:
    """An encoder (the object itself) with fresh pooling and heads; classes by target."""
    return Classifier(encoder.module, encoder.dims, {name: len(each) for name, each in classes.items()})


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
        return _only_row(self.model.classify(*self._tokens(case)))

    @torch.no_grad()
    def features(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, (F,) features in float32 that its head sees, over all windows of a case."""
        return _only_row(self.model.pooled(*self._tokens(case)))

    def _tokens(self, case: CaseVoxels) -> tuple[Tensor, Tensor]:
        """(1, L, D) and (1, L, 2) tokens of all windows and their weights."""
        self.model.eval()
        regions = self.regions(case)
        parts = []
        for first in range(0, len(regions), WINDOWS_AT_ONCE):
            parts.append(self.model.tokens(*self._tensors(regions[first : first + WINDOWS_AT_ONCE])))
        tokens, weights = (torch.cat([part[i] for part in parts]) for i in range(2))
        return by_case(tokens, weights, [len(regions)])

    def saliency(self, case: CaseVoxels) -> dict[str, np.ndarray]:
        """By target, a map (X, Y, Z) float32 of what speaks for its last class (above 0) and against it (below).

        It is gradient times input, integrated from a window of its median intensity to the window itself (integrated
        gradients, arXiv 1703.01365), of the logit minus the mean of the others, smoothed. Windows that overlap are
        averaged; each is pooled by itself.
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
        images, places = self._tensors([region])
        difference = torch.zeros_like(images)
        for channel in range(len(region.voxels)):  # not that of the mask
            difference[0, channel] = images[0, channel] - images[0, channel][places[0, 0]].median()
        total = {target: torch.zeros_like(images) for target in self.model.targets}
        for step in range(STEPS):
            between = (images - (1 - (step + 0.5) / STEPS) * difference).requires_grad_()
            for target, values in self.model(between, places).items():
                score = values[0, -1] - values[0, :-1].mean()
                total[target] += torch.autograd.grad(score, between, retain_graph=True)[0] / STEPS
        maps = {target: (value * difference).sum(dim=1)[0].cpu().numpy() for target, value in total.items()}
        return {target: gaussian_filter(value, SMOOTHING) for target, value in maps.items()}

    def _tensors(self, regions: Sequence[Region]) -> tuple[Tensor, Tensor]:
        """(M, C, X, Y, Z) images and (M, 2, X, Y, Z) places of windows."""
        images = np.stack([region.network_input(self.config.mask_channel) for region in regions])
        places = np.stack([region.places for region in regions])
        return torch.from_numpy(images).to(self.device), torch.from_numpy(places).to(self.device)


def _only_row(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value[0].float().cpu().numpy() for name, value in values.items()}


def _overlap(region: Region, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The voxels that a window and its case share: in the case, and in the window."""
    here, there = [], []
    for start, size, n in zip(region.start, region.counts.shape, shape, strict=True):
        low, high = max(start, 0), min(start + size, n)
        here.append(slice(low, high))
        there.append(slice(low - start, high - start))
    return tuple(here), tuple(there)
