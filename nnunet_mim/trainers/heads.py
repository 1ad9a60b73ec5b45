"""Where segmentation heads start: nearly everything is background."""

from __future__ import annotations

import math

from torch import nn


def start_from_prior(heads: nn.ModuleList, foreground: float, regions: bool) -> None:
    """Set the biases of the heads so that they give the foreground about the share of voxels that it has (the prior of
    RetinaNet, arXiv 1708.02002, for a softmax).

    AdamW moves a bias by about the learning rate in a step: a short training otherwise spends its first hundreds
    of steps on learning that most voxels are background (benchmarks/results/2026-11-26_head_prior_cpu.md). The weights
    stay as they are: with RetinaNet's small ones a training begins more slowly.

    Args:
        heads: 1x1x1 convolutions, their outputs are classes (background first) or regions.
        foreground: probability of all foreground classes together, or of each region, where the features say nothing;
            above 0 and below 1.
        regions: outputs are regions with a sigmoid each, without background.
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
