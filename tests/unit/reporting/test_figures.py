"""Figures draw what they are given, the right way up."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_mim.reporting.figures import segmentation_figure
from nnunet_mim.reporting.page import figure_png

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def organs():
    truth = np.zeros((12, 14, 16), np.uint8)
    truth[4:8, 4:8, 2:6], truth[4:8, 4:8, 10:14] = 1, 2
    ct, names = RNG.normal(0, 50, truth.shape), ["liver", "left_kidney"]
    return segmentation_figure(ct, truth, np.roll(truth, 1, 0), names, (1, 1, 1))


def test_organs_are_shown_upright_with_a_legend(organs) -> None:
    axial, coronal = organs.axes[0], organs.axes[3]
    assert axial.yaxis_inverted()  # y grows to the back: the chest is up
    assert not coronal.yaxis_inverted()  # z grows to the head: the head is up
    assert [t.get_text() for t in organs.legends[0].get_texts()] == ["liver", "left kidney"]
    assert [t.get_text() for t in axial.texts] == ["R", "L"]
    assert axial.get_ylabel() == "axial, slice 4"


def test_organs_that_were_not_found_are_no_error() -> None:
    empty = np.zeros((8, 8, 8), np.uint8)
    figure = segmentation_figure(empty, empty, empty, ["liver"], (5, 1, 1))
    assert figure_png(figure)[:4] == b"\x89PNG"
