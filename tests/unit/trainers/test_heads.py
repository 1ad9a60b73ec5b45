"""What untrained heads predict where the features say nothing, from the definition of the prior."""

import pytest
import torch
from torch import nn

from nnunet_mim.trainers.transfer import start_from_prior


def heads_of(outputs):
    return nn.ModuleList(nn.Conv3d(width, outputs, 1) for width in (16, 96))


@pytest.mark.parametrize("classes", [1, 4, 104])
@pytest.mark.parametrize("foreground", [0.04, 0.5, 0.9])
def test_every_class_has_its_share_of_the_foreground(classes, foreground):
    heads = heads_of(1 + classes)
    start_from_prior(heads, foreground, regions=False)
    for head in heads:
        probabilities = head(torch.zeros(1, head.in_channels, 8, 8, 8)).softmax(1).detach()
        assert probabilities[:, 0].mean() == pytest.approx(1 - foreground, abs=1e-5)
        shares = probabilities[:, 1:].mean((0, 2, 3, 4))
        assert shares.tolist() == pytest.approx([foreground / classes] * classes, rel=1e-4)


def test_every_region_is_as_likely_by_itself():
    heads = heads_of(3)
    before = [head.weight.clone() for head in heads]
    start_from_prior(heads, 0.04, regions=True)
    assert all(torch.equal(head.weight, weight) for head, weight in zip(heads, before, strict=True))
    for head in heads:
        probabilities = head(torch.zeros(1, head.in_channels, 8, 8, 8)).sigmoid().detach().mean((0, 2, 3, 4))
        assert probabilities.tolist() == pytest.approx([0.04] * 3, rel=1e-4)


def test_background_alone_is_certain():
    heads = heads_of(1)
    start_from_prior(heads, 0.04, regions=False)
    assert all(torch.equal(head.bias, torch.zeros(1)) for head in heads)
