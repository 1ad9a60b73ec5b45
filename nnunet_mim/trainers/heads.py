"""Where segmentation heads start: nearly everything is background."""

from __future__ import annotations

import math

from torch import nn

HEAD_STD = 0.01
"""of a head's weights at the start (RetinaNet, arXiv 1708.02002)"""


def start_from_prior(heads: nn.ModuleList, foreground: float, regions: bool) -> None:
    """Initialise the heads so that, whatever the features are, they give the foreground about the share of voxels that
    it has (the prior of RetinaNet, arXiv 1708.02002, for a softmax).

    Otherwise a short training spends its first hundred steps on learning that most voxels are background
    (benchmarks/results/2026-11-26_head_prior_cpu.md).

    Args:
        heads: 1x1x1 convolutions, their outputs are classes (background first) or regions.
        foreground: probability of all foreground classes together, or of each region; above 0 and below 1.
        regions: outputs are regions with a sigmoid each, without background.
    """
    for head in heads:
        assert isinstance(head, nn.Conv3d)
        assert head.bias is not None
        nn.init.normal_(head.weight, std=HEAD_STD)
        nn.init.zeros_(head.bias)
        classes = head.out_channels - 1
        odds = foreground / (1 - foreground)
        if regions:
            nn.init.constant_(head.bias, math.log(odds))
        elif classes:
            nn.init.constant_(head.bias[:1], math.log(classes / odds))
