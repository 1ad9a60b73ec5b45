"""Figures draw what they are given, the right way up."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_mim.reporting.figures import LossPanel, loss_figure, segmentation_figure
from nnunet_mim.reporting.page import figure_png

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def losses():
    curves = {"training": ([10, 20, 30], [1.2, 0.8, 0.5]), "held out": ([0, 30], [1.0, 0.7])}
    return loss_figure([LossPanel(f"level {n}", curves, {"token mean": 1.0, "infill": 0.9}) for n in (1, 2)])


@pytest.fixture(scope="module")
def organs():
    truth = np.zeros((12, 14, 16), np.uint8)
    truth[4:8, 4:8, 2:6], truth[4:8, 4:8, 10:14] = 1, 2
    return segmentation_figure(RNG.normal(0, 50, truth.shape), truth, np.roll(truth, 1, 0), ["liver", "left_kidney"])


def test_losses_are_drawn_with_their_baselines(losses) -> None:
    assert [axes.get_title() for axes in losses.axes] == ["level 1", "level 2"]
    lines = {line.get_label(): line for line in losses.axes[1].lines}
    assert list(lines) == ["training", "held out", "token mean", "infill"]
    np.testing.assert_array_equal(lines["held out"].get_xdata(), [0, 30])
    assert lines["token mean"].get_linestyle() == "--"
    assert "level 2: held out ends at 0.7" in losses.get_label()


def test_organs_are_shown_upright_with_a_legend(organs) -> None:
    axial, coronal = organs.axes[0], organs.axes[3]
    assert axial.yaxis_inverted()  # y grows to the back: the chest is up
    assert not coronal.yaxis_inverted()  # z grows to the head: the head is up
    assert [t.get_text() for t in organs.legends[0].get_texts()] == ["liver", "left kidney"]
    assert [t.get_text() for t in axial.texts] == ["R", "L"]
    assert axial.get_ylabel() == "axial, slice 4"


def test_organs_that_were_not_found_are_no_error() -> None:
    empty = np.zeros((8, 8, 8), np.uint8)
    figure = segmentation_figure(empty, empty, empty, ["liver"], spacing=(5, 1, 1))
    assert figure_png(figure)[:4] == b"\x89PNG"
