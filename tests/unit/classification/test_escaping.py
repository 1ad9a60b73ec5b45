"""Names of targets, classes and datasets, which come from a table and from settings, in the texts of a classifier."""

import csv

import numpy as np
import pytest
import yaml

from nnunet_mim.classification.export import card
from nnunet_mim.classification.labels import Target
from nnunet_mim.classification.report import write_report
from nnunet_mim.classification.results import Predictions, read_predictions, write_fold

HOSTILE = "<script>alert(1)</script>|a\n---\n# b [c](http://d)"


def assert_harmless(text):
    assert "<script" not in text
    assert "](" not in text
    assert "\n---" not in text
    assert "\n# b" not in text


@pytest.mark.parametrize("licence", ["cc-by-4.0", "yes", HOSTILE])
def test_a_card(tmp_path, licence):
    settings = {
        "targets": {HOSTILE: [HOSTILE, "b"]}, "dataset": HOSTILE, "spacing": [1.0, 1.0, 1.0],
        "encoder": {"origin": f"/x/{HOSTILE}"},
        "config": {"roi": "", "margin": 10.0, "mode": "probe", "encoder": HOSTILE},
    }  # fmt: skip
    text = card(tmp_path, settings, licence, HOSTILE)
    _, front, rest = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == licence
    assert list(yaml.safe_load(front)) == ["library_name", "license", "tags"]
    assert_harmless(rest)


def test_a_report(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "_") / "run" / "targets"
    probabilities = np.random.default_rng(0).dirichlet((1, 1), 12)
    cases = tuple(f"{HOSTILE}{number}" for number in range(12))
    target = Target(HOSTILE, (HOSTILE, "b"), np.arange(12) % 2)
    targets = {HOSTILE: [HOSTILE, "b"]}
    settings = {"config": {"roi": HOSTILE}, "targets": targets, "encoder": {}, "n_validation_cases": 12}
    for arm in ("probe", "scratch"):
        found = Predictions(cases, cases, np.zeros(12, int), target, probabilities, probabilities)
        write_fold(folder / arm / "fold_0", [found], settings)
    write_report(folder, None, which=HOSTILE)
    (markdown,) = folder.glob("*.md")
    assert_harmless(markdown.read_text())
    (page,) = folder.glob("*.html")
    assert "<script" not in page.read_text()


def test_names_are_no_formulas_in_a_table(tmp_path):
    """What is read back, predictions.csv, stays as it is."""
    formula = '=HYPERLINK("http://x")'
    probabilities = np.random.default_rng(0).dirichlet((1, 1), 12)
    cases = tuple(f"@case{number}" for number in range(12))
    target = Target(formula, ("-1", "+a"), np.arange(12) % 2)
    found = Predictions(cases, cases, np.zeros(12, int), target, probabilities, probabilities)
    fold = tmp_path / "x" / "run" / "targets" / "probe" / "fold_0"
    settings = {"config": {}, "targets": {formula: ["-1", "+a"]}, "encoder": {}, "n_validation_cases": 12}
    write_fold(fold, [found], settings)
    assert read_predictions(fold / "predictions.csv")[0].cases == cases
    write_report(fold.parents[1], None)
    _, *rows = csv.reader((fold.parents[1] / "report.csv").open(newline=""))
    assert {row[0] for row in rows} == {f"'{formula}"}
    assert {row[2] for row in rows} <= {"", "-1", "'+a"}
    assert all(float(row[4]) >= -1 for row in rows)
