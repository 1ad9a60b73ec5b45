import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnunet_mim.classification.folds import grouped_split
from nnunet_mim.classification.probe import (
    STRENGTHS,
    Design,
    Probe,
    cross_entropy,
    fit_probe,
    fit_temperature,
    probabilities,
)


def data(n, f, n_classes=2, signal=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    x = rng.normal(size=(n, f)) * rng.uniform(0.1, 10, f) + rng.normal(size=f)
    x[:, 0] += signal * labels * x[:, 0].std()
    return x.astype(np.float32), labels, [f"p{i // 2}" for i in rng.permutation(n)]


@pytest.mark.parametrize(("f", "n_classes"), [(5, 2), (90, 2), (5, 3), (90, 3)], ids=str)
def test_the_fit_is_that_of_scikit_learn(f, n_classes):
    """Also with more features than cases, where the problem is rotated."""
    x, labels, _ = data(60, f, n_classes)
    ours = Design.of(x).fit(labels, n_classes, 0.01)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=5000, tol=1e-8)).fit(x, labels)
    np.testing.assert_allclose(probabilities(ours.logits(x)), theirs.predict_proba(x), atol=2e-4)


def test_strength_follows_the_noise():
    x, labels, patients = data(120, 60, signal=6.0)
    assert fit_probe(x, labels, patients, 2, 0).probe.strength > STRENGTHS[1]
    rng = np.random.default_rng(0)
    assert fit_probe(rng.normal(size=(120, 60)), labels, patients, 2, 0).probe.strength <= 1e-4


def test_held_out_logits_know_nothing_of_the_patient():
    """Cases of a patient are copies with a class of chance: whoever has seen one knows the other."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(60, 200)), 2, axis=0)
    labels = np.repeat(rng.integers(0, 2, 60), 2)
    fitted = fit_probe(x, labels, [f"p{i // 2}" for i in range(120)], 2, 0)
    assert cross_entropy(fitted.held_out_logits, labels) > 0.6
    leaky = fit_probe(x, labels, [f"p{i}" for i in range(120)], 2, 0)
    assert cross_entropy(leaky.held_out_logits, labels) < 0.5


def test_labels_of_chance_are_not_told():
    """400 cases of 200 patients whose cases are alike, in folds as mim_classify makes them: AUROC 0.5 ± noise."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(200, 50)), 2, axis=0) + 0.1 * rng.normal(size=(400, 50))
    labels = np.repeat(rng.integers(0, 2, 200), 2)
    patients = [f"p{i // 2}" for i in range(400)]
    score = np.zeros(400)
    for train, val in grouped_split(labels, patients, 5, seed=0):
        fitted = fit_probe(x[train], labels[train], [patients[i] for i in train], 2, 0)
        score[val] = probabilities(fitted.probe.logits(x[val]), fitted.probe.temperature)[:, 1]
    assert roc_auc_score(labels, score) == pytest.approx(0.5, abs=0.08)


def test_temperature_is_found_again():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 3)) * 2
    labels = np.array([rng.choice(3, p=p) for p in probabilities(logits)])
    assert fit_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.05)


def test_constant_and_missing_features_are_harmless():
    x, labels, patients = data(60, 4, signal=8.0)
    x = np.concatenate([x, np.full((60, 1), 7.0), np.full((60, 1), np.nan)], axis=1)
    x[3, 0] = np.nan
    probe = fit_probe(x, labels, patients, 2, 0).probe
    assert np.isfinite(probe.logits(x)).all()
    assert (probabilities(probe.logits(x)).argmax(axis=1) == labels).mean() > 0.9
    np.testing.assert_allclose(probe.logits(np.full((1, 6), np.nan)), probe.intercept[None])


def test_a_class_without_cases():
    x, labels, patients = data(40, 3)
    p = probabilities(fit_probe(x, labels, patients, 3, 0).probe.logits(x))
    assert (p[:, 2] < 0.05).all()


def test_a_probe_comes_back_from_json():
    x, labels, patients = data(40, 7, 3)
    probe = fit_probe(x, labels, patients, 3, 0).probe
    again = Probe.from_dict(json.loads(json.dumps(probe.to_dict())))
    np.testing.assert_array_equal(again.logits(x), probe.logits(x))
    assert again.temperature == probe.temperature
