"""Figures draw what they are given, the right way up."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_mim.demo import figures
from nnunet_mim.demo.figures import LossPanel, ReconstructedView, loss_figure, segmentation_figure, views_figure
from nnunet_mim.demo.page import figure_png

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def views():
    mask = np.zeros((16, 16, 16), bool)
    mask[:8, :8] = True
    image = RNG.normal(0, 100, mask.shape)
    box = (slice(0, 8), slice(0, 8), slice(8, 16))
    return views_figure([
        ReconstructedView("level 1", image, mask, image * 0, box),
        ReconstructedView("level 2", image, mask, image * 0),
    ])  # fmt: skip


@pytest.fixture(scope="module")
def losses():
    curves = {"training": ([10, 20, 30], [1.2, 0.8, 0.5]), "held out": ([0, 30], [1.0, 0.7])}
    return loss_figure([LossPanel(f"level {n}", curves, {"token mean": 1.0, "infill": 0.9}) for n in (1, 2)])


@pytest.fixture(scope="module")
def organs():
    truth = np.zeros((12, 14, 16), np.uint8)
    truth[4:8, 4:8, 2:6], truth[4:8, 4:8, 10:14] = 1, 2
    return segmentation_figure(RNG.normal(0, 50, truth.shape), truth, np.roll(truth, 1, 0), ["liver", "left_kidney"])


def test_views_show_original_masked_and_reconstructed(views) -> None:
    axes = np.array(views.axes).reshape(2, 6)
    assert [a.get_title() for a in axes[0]][:3] == ["axial: original", "axial: masked", "axial: reconstructed"]
    assert [row[0].get_ylabel() for row in axes] == ["level 1", "level 2"]
    original, masked, made = (a.images[0].get_array()[..., 0] for a in axes[0, :3])
    hidden = np.zeros((16, 16), bool)
    hidden[:8] = True
    np.testing.assert_array_equal(original[~hidden], masked[~hidden])
    np.testing.assert_array_equal(original[~hidden], made[~hidden])
    assert len(np.unique(masked[hidden])) == 2  # grey and hatch: nothing of the image
    np.testing.assert_allclose(made[hidden], 450 / 800, rtol=1e-6)  # 0 HU in the window -450…350


def test_the_place_of_the_next_row_is_framed(views) -> None:
    axes = np.array(views.axes).reshape(2, 6)
    assert [len(a.patches) for a in axes.flat] == [1, 1, 0, 1, 1, 0] + 6 * [0]
    axial, coronal = (axes[0, column].patches[0] for column in (1, 4))
    assert (axial.get_xy(), axial.get_width(), axial.get_height()) == ((7.5, -0.5), 8, 8)
    assert coronal.get_xy() == (7.5, -0.5)


def test_slice_shown_goes_through_the_framed_place() -> None:
    assert figures._slice_through(slice(32, 64), 64) == 40
    assert figures._slice_through(slice(0, 32), 64) == 23
    assert figures._slice_through(slice(16, 48), 64) == 32


def test_slice_shown_has_masked_and_visible_voxels() -> None:
    mask = np.zeros((16, 16, 16), bool)
    mask[:8] = True  # every axial slice is all masked or all visible
    assert figures._telling_slice(mask, 0) == 8
    mask[2, :8] = False
    assert figures._telling_slice(mask, 0) == 2


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
