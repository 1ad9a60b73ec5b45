import numpy as np
import pytest
from sklearn import metrics

from nnunet_mim.classification import evaluation as ev
from nnunet_mim.classification.evaluation import differences, evaluate, figures, interval, patient_draws

N = 80


@pytest.fixture(params=["scattered", "tied"])
def binary(request):
    """(labels, score, (B, N) whole weights); tied scores have five values."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, N)
    score = np.clip(rng.normal(0.4 + 0.2 * labels, 0.25), 0, 1)
    score = np.round(score * 4) / 4 if request.param == "tied" else score
    return labels, score, rng.integers(0, 4, (6, N)).astype(float)


def one_by_one(function, labels, score, weights):
    return [function(labels, score, sample_weight=w) for w in weights]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ev.auroc, metrics.roc_auc_score), (ev.average_precision, metrics.average_precision_score)],
)
def test_curves_are_those_of_scikit_learn(binary, ours, theirs):
    labels, score, weights = binary
    np.testing.assert_allclose(ours(labels == 1, score, weights), one_by_one(theirs, labels, score, weights))


def test_sensitivity_is_on_the_roc_curve_of_scikit_learn(binary):
    labels, score, weights = binary
    for specificity in (0.5, 0.9, 1.0):
        expected = []
        for w in weights:
            false, true, _ = metrics.roc_curve(labels, score, sample_weight=w, drop_intermediate=False)
            expected.append(true[false <= 1 - specificity + 1e-9].max())
        np.testing.assert_allclose(ev.sensitivity_at(labels == 1, score, weights, specificity), expected)


def test_figures_of_two_classes_are_those_of_scikit_learn(binary):
    labels, score, weights = binary
    found = figures(labels, np.stack([1 - score, score], axis=1), weights)
    told = (score > 0.5).astype(int)
    np.testing.assert_allclose(
        found["balanced_accuracy"], one_by_one(metrics.balanced_accuracy_score, labels, told, weights)
    )
    np.testing.assert_allclose(found["f1"], one_by_one(metrics.f1_score, labels, told, weights))
    np.testing.assert_allclose(found["brier"], one_by_one(metrics.brier_score_loss, labels, score, weights))


def test_figures_of_three_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, N)
    logits = rng.normal(size=(N, 3)) + 1.5 * np.eye(3)[labels]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    weights, told = np.ones((1, N)), p.argmax(axis=1)
    found = {name: float(value[0]) for name, value in figures(labels, p, weights).items()}
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, p, multi_class="ovr"))
    assert found["average_precision"] == pytest.approx(metrics.average_precision_score(np.eye(3)[labels], p))
    assert found["f1"] == pytest.approx(metrics.f1_score(labels, told, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, told))
    assert found["brier"] == pytest.approx(np.mean(((p - np.eye(3)[labels]) ** 2).sum(axis=1)))


def test_by_hand():
    labels, score = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.4, 0.9])
    found = figures(labels, np.stack([1 - score, score], axis=1), np.ones((1, 4)))
    assert found["auroc"][0] == 0.75  # 3 of 4 pairs are in order
    assert found["average_precision"][0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["balanced_accuracy"][0] == 0.5
    assert found["f1"][0] == 0.5
    assert found["sensitivity"][0] == 0.5
    assert found["brier"][0] == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    # bins: 0.1 (truth 0), 0.4 (1), 0.6 (0), 0.9 (1)
    assert found["calibration_error"][0] == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4)


def test_a_draw_without_a_class_has_no_auroc():
    assert np.isnan(ev.auroc(np.array([True, False]), np.array([0.2, 0.1]), np.array([[1.0, 0.0]]))[0])


def test_all_cases_of_a_patient_are_drawn_together():
    draws = patient_draws(["b", "a", "b", "c", "a"], 50, seed=0)
    np.testing.assert_array_equal(draws[:, 0], draws[:, 2])
    np.testing.assert_array_equal(draws[:, 1], draws[:, 4])
    np.testing.assert_array_equal(draws[:, [0, 1, 3]].sum(axis=1), 3)
    assert len({tuple(draw) for draw in draws}) > 5


def test_intervals_widen_when_cases_of_a_patient_are_copies():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 100)
    score = np.clip(rng.normal(0.4 + 0.2 * labels, 0.3), 0, 1)
    probabilities = np.stack([1 - score, score], axis=1)
    single = evaluate(labels, probabilities, patient_draws([str(i) for i in range(100)], 500, 0))[0]["auroc"]
    four_times = [np.repeat(values, 4, axis=0) for values in (labels, probabilities)]
    grouped = evaluate(*four_times, patient_draws([str(i // 4) for i in range(400)], 500, 0))[0]["auroc"]
    naive = evaluate(*four_times, patient_draws([str(i) for i in range(400)], 500, 0))[0]["auroc"]
    width = {name: each.high - each.low for name, each in (("s", single), ("g", grouped), ("n", naive))}
    assert width["g"] == pytest.approx(width["s"], rel=0.15)
    assert width["n"] < 0.7 * width["s"]


def test_differences_are_paired_and_corrected():
    rng = np.random.default_rng(1)
    drawn = {"a": rng.normal(0.9, 0.05, 999)}
    drawn["b"] = drawn["a"] - 0.02  # always worse, though the intervals of both overlap
    drawn["c"] = rng.normal(0.9, 0.05, 999)
    same, noise = differences({"a": 0.9, "b": 0.88, "c": 0.9}, drawn, [("a", "b"), ("a", "c")])
    assert same.interval.low == pytest.approx(0.02)
    assert same.is_better
    assert same.p == pytest.approx(2 / 1000)
    assert same.corrected_p == pytest.approx(4 / 1000)
    assert not noise.is_better
    assert noise.p > 0.5


def test_an_interval_without_any_draw_is_not_there():
    assert np.isnan(interval(0.5, np.array([np.nan])).low)


@pytest.mark.long
def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 samples of 120 patients with one to three alike cases; the AUROC of two normal scores 1 apart is known."""
    from scipy.stats import norm

    truth = norm.cdf(1 / np.sqrt(2))
    rng, held = np.random.default_rng(7), 0
    for sample in range(300):
        n_cases = rng.integers(1, 4, 120)
        patients = np.repeat(np.arange(120), n_cases)
        labels = np.repeat(rng.integers(0, 2, 120), n_cases)
        shared = np.repeat(rng.normal(size=120), n_cases)
        score = labels + np.sqrt(0.7) * shared + np.sqrt(0.3) * rng.normal(size=len(labels))
        draws = patient_draws([str(p) for p in patients], 1000, sample)
        found = interval(0.0, ev.auroc(labels == 1, score, draws))
        held += found.low <= truth <= found.high
    assert 0.91 <= held / 300 <= 0.98


def test_a_figure_that_no_draw_has_is_without_an_interval():
    assert str(interval(0.5, np.array([np.nan, np.nan]))) == "0.500 (no interval)"
    assert str(interval(0.5, np.array([0.25, 0.25]))) == "0.500 (0.250 to 0.250)"
