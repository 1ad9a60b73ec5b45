import numpy as np
import pytest
from sklearn.metrics import auc

from nnunet_mim.reporting.classifiers import (
    CasePicture,
    calibration_figure,
    cases_figure,
    confusion_figure,
    curves_figure,
)
from nnunet_mim.reporting.page import figure_png

POSITIVE = np.array([True, False, True, False])


def test_curves_end_where_they_have_to():
    figure = curves_figure(POSITIVE, {"good": np.array([0.9, 0.1, 0.8, 0.2]), "poor": np.zeros(4)}, "sick")
    roc, precision_recall = figure.axes
    good, poor, _ = roc.lines
    assert auc(*good.get_data()) == 1.0
    assert auc(*poor.get_data()) == 0.5
    assert precision_recall.lines[-1].get_ydata()[0] == 0.5  # the share of positive cases
    assert "good, poor" in figure.get_label()


def test_calibration_is_the_share_of_cases_in_each_bin():
    score = np.array([0.05, 0.05, 0.95, 1.0])
    axes = calibration_figure(POSITIVE, {"network": score}, "sick").axes[0]
    np.testing.assert_allclose(axes.lines[1].get_data(), [[0.05, 0.975], [0.5, 0.5]])


def test_confusion_counts_true_classes_in_rows():
    figure = confusion_figure(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), ("a", "b", "c"), "network")
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in figure.axes[0].texts}
    assert [texts[row, column] for row in range(3) for column in range(3)] == list("110010100")


@pytest.mark.parametrize("n", [1, 5])
def test_cases_are_drawn_with_their_masks(n):
    mask = np.zeros((6, 8), bool)
    masks = [mask, ~mask, mask.copy()]
    masks[2][2:4, 3:5] = True
    picture = np.arange(48.0).reshape(6, 8)
    pictures = [CasePicture(f"case {i}", picture, masks[(i + 2) % 3], (2.0, 1.0, 0.5)) for i in range(n)]
    figure = cases_figure(pictures, (0.0, 48.0))
    assert figure_png(figure).startswith(b"\x89PNG")
    assert len(figure.axes) == 4 * -(-n // 4)
    assert figure.axes[0].get_title() == "case 0"
    assert figure.axes[0].collections  # the outline
    assert "case 0" in figure.get_label()
