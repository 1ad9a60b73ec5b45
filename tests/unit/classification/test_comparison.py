from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nnunet_mim.classification.comparison import evaluate_arms, verdict
from nnunet_mim.classification.labels import Target
from nnunet_mim.classification.results import Predictions, write_fold
from nnunet_mim.errors import MiMError

N = 120
LABELS = np.arange(N) % 2
CASES = tuple(f"case_{i:03d}" for i in range(N))


def scores(signal, seed):
    """(N,) probabilities; the larger the signal the better."""
    return 1 / (1 + np.exp(-np.random.default_rng(seed).normal(signal * (2 * LABELS - 1), 1.0)))


@pytest.fixture
def folder(tmp_path):
    """The folder of the targets `sick`; folder.write(arm, score) adds an arm of two folds."""

    class Folder:
        path = tmp_path / "sick"

        def write(self, arm, score, folds=(0, 1), labels=LABELS):
            for fold in folds:
                rows = np.arange(fold * N // 2, (fold + 1) * N // 2)
                p = np.stack([1 - score, score], axis=1)[rows]
                target = Target("sick", ("no", "yes"), labels[rows])
                cases = tuple(CASES[row] for row in rows)
                patients = tuple(f"p{row // 3}" for row in rows)
                write_fold(
                    self.path / arm / f"fold_{fold}",
                    [Predictions(cases, patients, np.full(len(rows), fold), target, p, p)],
                    {"n_validation_cases": len(rows)},
                )

    return Folder()


def test_a_network_that_does_not_beat_the_size_says_so_first(folder):
    folder.write("probe", scores(0.5, 1))
    folder.write("baseline_size", scores(0.6, 2))
    (found,), notes = evaluate_arms(folder.path, n_draws=200)
    assert verdict(found).startswith("sick: probe does not beat the size alone: AUROC 0.")
    assert not notes
    assert found.figures["probe"]["auroc"].value == pytest.approx(roc_auc_score(LABELS, scores(0.5, 1)))


def test_a_network_that_beats_the_size_and_its_control(folder):
    folder.write("finetune", scores(2.0, 1))
    folder.write("scratch", scores(0.3, 3))
    folder.write("finetune+covariates", scores(3.0, 5))
    folder.write("baseline_size", scores(0.2, 2))
    folder.write("baseline_prevalence", np.full(N, 0.5))
    (found,), _ = evaluate_arms(folder.path, n_draws=200)
    assert found.networks[0] == "finetune+covariates"
    assert found.main == "finetune"  # the covariates are not the network's
    text = verdict(found)
    assert text.startswith("sick: finetune beats the size alone: AUROC 0.9")
    assert "It is better than scratch: AUROC" in text
    pairs = {(each.first, each.second) for each in found.differences}
    assert ("finetune", "baseline_size") in pairs
    assert not any("baseline_prevalence" in pair for pair in pairs)
    assert len(pairs) == 3 + 3  # each network against the size, and all pairs of networks
    better = next(e for e in found.differences if (e.first, e.second) == ("finetune", "scratch"))
    assert better.is_better
    assert better.corrected_p >= better.p


def test_only_a_control_or_only_baselines(folder):
    folder.write("baseline_size", scores(0.2, 2))
    (found,), _ = evaluate_arms(folder.path, n_draws=50)
    assert verdict(found) == "sick: only baselines are trained."
    folder.write("probe_random", scores(0.2, 3))
    (found,), _ = evaluate_arms(folder.path, n_draws=50)
    assert verdict(found).startswith("sick: probe_random does not beat the size alone")


def test_some_cases_and_unknown_classes(folder):
    unknown = np.where(np.arange(N) < 10, -1, LABELS)
    folder.write("probe", scores(1.0, 1), labels=unknown)
    kept = set(CASES[:60])
    (found,), _ = evaluate_arms(folder.path, kept, n_draws=50)
    assert found.arms["probe"].cases == CASES[10:60]
    expected = roc_auc_score(LABELS[10:60], scores(1.0, 1)[10:60])
    assert found.figures["probe"]["auroc"].value == pytest.approx(expected)
    with pytest.raises(MiMError, match="no case of 'sick' is left: widen --where"):
        evaluate_arms(folder.path, {"nobody"})


def test_each_class_against_the_others(folder):
    folder.write("probe", scores(1.0, 1))
    (found,), _ = evaluate_arms(folder.path, n_draws=50)
    no, yes = found.per_class["probe"].values()
    assert no["auroc"].value == pytest.approx(yes["auroc"].value)
    assert yes["f1"] == replace(found.figures["probe"]["f1"])
    assert no["sensitivity"].value != yes["sensitivity"].value


def test_incomplete_arms(folder):
    with pytest.raises(MiMError, match="nothing is trained in"):
        evaluate_arms(folder.path)
    folder.write("probe", scores(1.0, 1))
    folder.write("finetune", scores(1.0, 2), folds=(1,))
    (found,), notes = evaluate_arms(folder.path, n_draws=50)
    assert list(found.arms) == ["probe"]
    assert notes == ["finetune is left out: 60 of 120 cases are not predicted yet"]
