"""Pictures of views draw what they are given, the right way up and in proportion."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_mim.reporting.page import figure_png
from nnunet_mim.reporting.views import ReconstructedView, comparison_figure, interest, slice_to_show, views_figure

RNG = np.random.default_rng(0)
BOX = (slice(0, 8), slice(0, 8), slice(8, 16))


def make_views(spacing=(1.0, 1.0, 1.0)):
    mask = np.zeros((16, 16, 16), bool)
    mask[:8, :8] = True
    image = RNG.normal(0, 100, mask.shape)
    return [
        ReconstructedView("level 1", image, mask, image * 0, BOX, spacing, image * 0 - 50, image * 0 + 100),
        ReconstructedView("level 2", image, mask, image * 0, None, spacing, image * 0 - 50, image * 0 + 100),
    ]


@pytest.fixture(scope="module")
def views():
    return views_figure(make_views())


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


def test_pictures_are_upright_and_in_proportion() -> None:
    axes = np.array(views_figure(make_views((5.0, 2.0, 1.0))).axes).reshape(2, 6)
    axial, coronal = axes[0, 0], axes[0, 3]
    assert axial.yaxis_inverted()  # y grows to the back: the chest is up
    assert not coronal.yaxis_inverted()  # z grows to the head: the head is up
    assert (axial.get_aspect(), coronal.get_aspect()) == (2, 5)
    assert [t.get_text() for t in axial.texts] == ["R", "L"]


def test_comparison_has_four_ways_to_fill_in() -> None:
    figure = comparison_figure(make_views())
    axes = np.array(figure.axes).reshape(2, 4)
    original, given, infill, network = (a.images[0].get_array()[..., 0] for a in axes[0])
    for filled, hu in ((given, -50), (infill, 100), (network, 0)):
        np.testing.assert_allclose(filled[:8], (hu + 450) / 800, rtol=1e-6)
        np.testing.assert_array_equal(filled[8:], original[8:])
    assert "by the network" in figure.get_label()
    assert figure_png(figure)[:4] == b"\x89PNG"


def test_slice_shown_goes_through_the_framed_place_and_shows_what_is_filled_in() -> None:
    mask = np.zeros((16, 16, 16), bool)
    mask[:, :8] = True
    image = np.zeros(mask.shape)
    image[5, :8] = RNG.random((8, 16))
    assert slice_to_show(image, mask, 0) == 5
    assert slice_to_show(image, mask, 0, (slice(8, 16), slice(0, 8), slice(0, 8))) == 10  # well inside, to the middle
    assert slice_to_show(image, np.zeros_like(mask), 0) == 7


def test_slice_shown_has_masked_and_visible_voxels() -> None:
    mask = np.zeros((16, 16, 16), bool)
    mask[:8] = True  # every axial slice is all masked or all visible
    mask[2, :8] = False
    assert slice_to_show(RNG.random(mask.shape), mask, 0) == 2


def test_air_is_of_no_interest() -> None:
    tissue = 0.5 + 0.1 * RNG.normal(size=(8, 8, 8))
    half = np.where(np.arange(8)[:, None, None] < 4, 0, tissue)
    assert interest(tissue) > interest(half) > interest(np.zeros((8, 8, 8))) == 0
