"""Tables of labels, folds and the files of a classifier changed at random: taken as they are meant, or one line."""

import contextlib
import json
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from nnunet_mim.classification.documents import read_export_settings, read_settings, read_training
from nnunet_mim.classification.folds import SPLITS_FILE, find_folds
from nnunet_mim.classification.labels import check_classes, read_labels
from nnunet_mim.classification.predict import load_classifier
from nnunet_mim.classification.results import read_predictions
from nnunet_mim.errors import MiMError

TABLE = "case,patient,lesion,size\n" + "".join(f"c{n:02},p{n // 2},{n % 2},{n}.5\n" for n in range(12))
JUNK = (
    "", " ", "na", "0", "1", "1.0", "01", "1_0", "-1", "nan", "inf", "1e999", "c01", "p1", "x", "a,b", "a;b", "a\tb",
    '"', '"x', 'x"y', '"a\nb"', "\n", "\r", "\x00", "\x1b[2J", "\xe9", "\ud800", "=1+1", "../x", "x" * 200_000, "case",
)  # fmt: skip
VALUES = (
    ..., None, True, 0, -1, 3, 2**70, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "c01", "x" * 500,
    "\x1b[2J\n", "../../x", [], {}, [[]], [1], ["c00"], ["c00", "c00"], {"a": 1}, [None],
    {"train": ["c00"], "val": ["c01"]},
)  # fmt: skip


def one_line(run, *arguments):
    """What a function returns, or None where it refuses in one line, within five seconds."""
    began = time.monotonic()
    try:
        result, said = run(*arguments), "nothing"
    except MiMError as error:
        result, said = None, str(error)
    assert time.monotonic() - began < 5
    assert len(said.splitlines()) == 1
    return result


def table_of(path, text):
    """A table is refused, or every row of it is there as it is written."""
    path.write_bytes(text.encode(errors="surrogatepass"))
    found = one_line(read_labels, path, ["lesion"], ["size"])
    if found is None:
        return None
    one_line(check_classes, found, 3, path)
    (target,) = found.targets
    rows = [line.split(",") for line in text.replace("\r", "").split("\n")[1:] if line.strip(", ")]
    known = {row[0].strip(): row[2].strip() for row in rows if row[2].strip().lower() not in ("", "na", "nan", "n/a")}
    said = {case: target.classes[n] for case, n in zip(found.cases, target.labels, strict=True) if n >= 0}
    if '"' not in text and text.split("\n")[0] == TABLE.split("\n")[0]:
        assert said == known
    with contextlib.suppress(ValueError):  # of classes that are no numbers
        assert len(set(map(float, target.classes))) == len(target.classes)
    return found


def changed_cell(row, column, value):
    lines = TABLE.split("\n")[:-1]
    number = int(row * len(lines))
    cells = lines[number].split(",")
    cells[int(column * len(cells))] = value
    lines[number] = ",".join(cells)
    return "\n".join(lines) + "\n"


FOLDS = [
    {"train": [f"c{n:02}" for n in range(12) if n // 4 != k], "val": [f"c{n:02}" for n in range(12) if n // 4 == k]}
    for k in range(3)
]


def folds_of(folder, content):
    """Folds are refused, or hold every case once in a validation, and no patient on both sides."""
    (folder / "labels.csv").write_text(TABLE)
    table = read_labels(folder / "labels.csv", ["lesion"])
    (folder / SPLITS_FILE).write_text(json.dumps(content))
    found = one_line(find_folds, folder, table, 3)
    if found is not None:
        assert sorted(row for rows in found.validation for row in rows) == list(range(12))
        for train, val in zip(found.training, found.validation, strict=True):
            assert not {table.patients[row] for row in train} & {table.patients[row] for row in val}
    return found


PREDICTIONS = "case,patient,fold,t,t=a,t=b,t=a:raw,t=b:raw\n" + "".join(
    f"c{n},p{n},0,{'ab'[n % 2]},0.25,0.75,0.5,0.5\n" for n in range(4)
)
DOCUMENTS = {
    "settings.json": {
        "dataset": "Dataset007_Toy", "plans": "nnUNetPlans", "configuration": "3d_fullres", "fold": 0,
        "config": {"mode": "probe", "roi": "labels", "margin": 10.0, "checkpoint": "none", "window": [64, 64, 64]},
        "targets": {"lesion": ["0", "1"]}, "spacing": [1.0, 1.0, 1.0], "folds": "splits_final.json",
        "encoder": {"origin": "none", "sha256": "0" * 64, "architecture": {
            "encoder": "hybrid", "in_channels": 1, "network": {"embed_dims": [6, 6, 6, 12], "depths": [1, 1, 1, 1],
                                                                "num_heads": 2}}},
    },
    "probe.json": {"lesion": {"mean": [0.0], "scale": [1.0], "coefficients": [[0.0, 0.0]], "intercept": [0.0, 0.0],
                              "strength": 1.0, "temperature": 1.0}},
    "training.json": {"temperatures": {"lesion": 1.5}, "sha256": "0" * 64, "skipped_steps": 0,
                      "history": [{"epoch": 0.0}], "inner_cases": ["case_00"]},
}  # fmt: skip


def classifier_of(folder, name, content, mode):
    """Whatever the files of a fold say, reading them ends in one line."""
    fold = folder / "fold_0"
    fold.mkdir(exist_ok=True)
    settings = DOCUMENTS["settings.json"]
    settings = {**settings, "config": {**settings["config"], "mode": mode}}
    for file, own in {**DOCUMENTS, "settings.json": settings, name: content}.items():
        (fold / file).write_text(json.dumps(own))
    weights = save({"stem.weight": torch.zeros(2)})
    for file in (fold / "model.safetensors", folder / "encoder_000000000000.safetensors"):
        file.write_bytes(weights)
    shutil.copy(fold / "settings.json", folder)
    for read, path in ((read_settings, fold), (read_training, fold), (read_export_settings, folder)):
        one_line(read, path)
    assert one_line(load_classifier, folder, ["all"], "cpu") is None, "its weights are none"


SHARES = st.floats(0, 1, exclude_max=True)
CELLS = {"row": SHARES, "column": SHARES, "value": st.sampled_from(JUNK)}
BYTES = {"changes": st.lists(st.tuples(SHARES, st.integers(0, 127)), min_size=1, max_size=3)}
PLACES = {"share": SHARES, "value": st.sampled_from(VALUES)}
MODES = st.sampled_from(["probe", "finetune", "scratch"])
FILES = {**PLACES, "name": st.sampled_from(sorted(DOCUMENTS)), "mode": MODES}
QUIET = {"suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def predictions_of(path, changes):
    """Predictions are refused, or are finite probabilities of as many cases as there are rows."""
    content = bytearray(PREDICTIONS.encode())
    for share, byte in changes:
        content[int(share * len(content))] = byte
    path.write_bytes(content)
    for part in one_line(read_predictions, path) or ():
        assert np.isfinite(part.calibrated).all()
        assert len(part.cases) == len(part.target.labels) == len(part.raw)


def test_what_is_changed_is_taken(tmp_path):
    assert len(table_of(tmp_path / "labels.csv", TABLE).cases) == 12
    assert len(folds_of(tmp_path, FOLDS)) == 3
    (tmp_path / "predictions.csv").write_text(PREDICTIONS)
    assert read_predictions(tmp_path / "predictions.csv")[0].cases == ("c0", "c1", "c2", "c3")


@settings(max_examples=60, **QUIET)
@given(**CELLS)
@example(0.5, 0.6, "x" * 200_000)
@example(0.5, 0.6, '"a\nb"')
@example(0.5, 0.6, "1.0")
@example(0.5, 0.9, "1_0")
def test_cells(tmp_path, row, column, value):
    table_of(tmp_path / "labels.csv", changed_cell(row, column, value))


@settings(max_examples=60, **QUIET)
@given(**PLACES)
def test_folds(tmp_path, junk, share, value):
    folds_of(tmp_path, junk.put(FOLDS, junk.at(FOLDS, share), value))


@settings(max_examples=60, **QUIET)
@given(**BYTES)
def test_predictions(tmp_path, changes):
    predictions_of(tmp_path / "predictions.csv", changes)


@settings(max_examples=30, **QUIET)
@given(**FILES)
def test_files_of_a_classifier(tmp_path, junk, share, value, name, mode):
    whole = DOCUMENTS[name]
    classifier_of(tmp_path, name, junk.put(whole, junk.at(whole, share), value), mode)


@pytest.mark.long
@settings(max_examples=400, **QUIET)
@given(**CELLS)
def test_cells_at_length(tmp_path, row, column, value):
    table_of(tmp_path / "labels.csv", changed_cell(row, column, value))


@pytest.mark.long
@settings(max_examples=200, **QUIET)
@given(**PLACES)
def test_folds_at_length(tmp_path, junk, share, value):
    folds_of(tmp_path, junk.put(FOLDS, junk.at(FOLDS, share), value))


@pytest.mark.long
@settings(max_examples=300, **QUIET)
@given(**BYTES)
def test_predictions_at_length(tmp_path, changes):
    predictions_of(tmp_path / "predictions.csv", changes)


@pytest.mark.long
@settings(max_examples=600, **QUIET)
@given(**FILES)
def test_files_of_a_classifier_at_length(tmp_path, junk, share, value, name, mode):
    whole = DOCUMENTS[name]
    classifier_of(tmp_path, name, junk.put(whole, junk.at(whole, share), value), mode)
