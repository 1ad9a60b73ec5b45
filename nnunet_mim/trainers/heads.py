"""Initial biases of the segmentation heads."""

from __future__ import annotations

import math

from torch import nn


def start_from_prior(heads: nn.ModuleList, foreground: float, regions: bool) -> None:
    """Set the biases of the heads so that they predict about the true share of foreground.

    This is the prior of RetinaNet (arXiv 1708.02002) for a softmax. AdamW moves a bias by about the learning rate per
    step, so short trainings would need hundreds of steps to learn that most voxels are background
    (benchmarks/results/2026-11-26_head_prior_cpu.md). Weights are not changed: RetinaNet's small ones slow the start.

    Args:
        heads: 1x1x1 convolutions; their outputs are classes (background first) or regions.
        foreground: probability of all foreground classes together, or of each region; above 0 and below 1.
        regions: whether outputs are regions with a sigmoid each, without background.
    """
    for head in heads:
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
        classes = head.out_channels - 1
        odds = foreground / (1 - foreground)
        if regions:
            nn.init.constant_(head.bias, math.log(odds))
        elif classes:
            nn.init.constant_(head.bias[:1], math.log(classes / odds))
