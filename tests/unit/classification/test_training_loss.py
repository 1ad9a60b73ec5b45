"""The loss of a classifier, and what balances its classes, worked out by hand."""


import numpy as np
import pytest
import torch

from nnunet_mim.classification.finetune import batch_loss, class_weights, sampling_chances
from nnunet_mim.classification.labels import Target


def test_the_loss_by_hand():
    logits = {"a": torch.tensor([[0.0, 1.0], [2.0, 0.0], [5.0, 5.0]]), "b": torch.tensor([[0.0, 0, 3]] * 3)}
    labels = torch.tensor([[1, 2], [0, -1], [-1, -1]])
    weights = {"a": np.log([3.0, 0.5]), "b": np.zeros(3)}
    binary = np.array([np.log1p(np.exp(-1)), np.log1p(np.exp(-2))])  # of the differences of the two logits
    classes = np.log(np.exp([0, 0, 3]).sum()) - 3
    expected = ((binary * [0.5, 3.0]).sum() + classes) / (4 * 2)
    assert float(batch_loss(logits, labels, weights, 4)) == pytest.approx(expected)


def test_weights_and_chances_by_hand():
    one = Target("one", ("0", "1"), np.array([0, 0, 0, 1, -1]))
    other = Target("other", ("0", "1", "2"), np.array([0, 1, 1, -1, 1]))
    rows = np.arange(5)
    np.testing.assert_allclose(class_weights(one, rows), [4 / 6, 2])
    np.testing.assert_allclose(class_weights(other, rows)[:2], [2, 4 / 6])
    first, third = (4 / 6 + 2) / 2, 2 / 3
    np.testing.assert_allclose(sampling_chances([one, other], rows), [first, third, third, 2, third])
