"""The names of figures: as they have always been, made in one file, and read back from any version's rows."""

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_mim.pretraining.monitoring.figures import (
    GuessFigures,
    HeldOutLevel,
    LevelFigures,
    Measurement,
    ProbeFigures,
    TrainingFigures,
    averaged,
    mapped,
)

ROOT = Path(__file__).parents[4]
TRAINING = """\
train/level2/reconstruction train/level2/targets train/level2/padded_share train/level2/flat_share train/level2/loss
train/level3/reconstruction train/level3/targets train/level3/padded_share train/level3/flat_share
train/level3/alignment_top1 train/level3/alignment train/level3/loss
train/grad_norm train/skipped train/loss lr crops_per_s train/unread
train/crops/Dataset900_Tiny train/crops/Dataset901_Tiny
"""
HELD_OUT = """\
val/Dataset900_Tiny/level2 val/level2/reconstruction val/level2/targets val/level2/padded_share val/level2/flat_share
val/level2/loss val/level2/psnr
val/Dataset900_Tiny/level3 val/level3/reconstruction val/level3/targets val/level3/padded_share val/level3/flat_share
val/level3/alignment_top1 val/level3/alignment val/level3/loss val/level3/psnr
val/Dataset901_Tiny/level2 val/Dataset901_Tiny/level3 val/loss val/features/rank val/features/std
baseline/level2/token_mean baseline/level2/token_mean_psnr baseline/level2/infill baseline/level2/infill_psnr
baseline/level3/token_mean baseline/level3/token_mean_psnr baseline/level3/infill baseline/level3/infill_psnr
val/level3/alignment_chance val/probe/dice val/probe/dice_1 val/probe/dice_12
"""


@pytest.mark.parametrize(("kind", "names"), [(TrainingFigures, TRAINING), (Measurement, HELD_OUT)])
def test_columns_are_those_of_every_version_in_their_order(kind, names):
    row = {name: float(number) for number, name in enumerate(names.split())}
    assert list(kind.from_row(row).row().items()) == list(row.items())


def test_columns_of_figures_made_by_hand():
    level = LevelFigures(1, reconstruction=0.5, loss=0.25)
    train = TrainingFigures(levels=(level,), learning_rate=0.1, crops={"A": 3.0})
    assert train.row() == {"train/level1/reconstruction": 0.5, "train/level1/loss": 0.25, "lr": 0.1, "train/crops/A": 3}
    held_out = HeldOutLevel(1, reconstruction=0.5, guesses=GuessFigures(infill=0.9), datasets={"A": 0.4, "B": 0.6})
    assert list(Measurement(levels=(held_out,), loss=0.5, probe=ProbeFigures(0.1, {7: 0.2})).row()) == [
        "val/A/level1", "val/level1/reconstruction", "val/B/level1", "val/loss", "baseline/level1/infill",
        "val/probe/dice", "val/probe/dice_7",
    ]  # fmt: skip


def test_rows_of_other_versions():
    """A row of `loss_history` holds both kinds; an older one fewer figures, a newer one others."""
    row = {"iteration": 250, "train/loss": 2.0, "val/level1/reconstruction": 0.5, "val/x": 1.0, "val/level1/x": 2.0}
    val, train = Measurement.from_row(row), TrainingFigures.from_row(row)
    assert val.iteration == train.iteration == 250
    assert val.row() == {"val/level1/reconstruction": 0.5}
    assert train.row() == {"train/loss": 2.0}
    assert [level.number for level in val.reconstructed] == [1]
    assert val.level(3) == HeldOutLevel(3)
    assert val.probe.dice is None
    assert np.isnan(Measurement.from_row({}).iteration)


def test_columns_of_a_file_are_read_like_rows():
    columns = {"iteration": np.arange(2.0), "baseline/level2/infill": np.array([0.9, np.nan])}
    assert Measurement.from_row(columns).level(2).guesses.infill is columns["baseline/level2/infill"]


def test_mapped_and_averaged_by_hand():
    first = LevelFigures(2, reconstruction=1.0, targets=1.0, loss=2.0, nonfinite=1.0)
    second = replace(first, reconstruction=5.0, targets=3.0, loss=4.0)
    added = LevelFigures(2, reconstruction=6.0, targets=4.0, loss=6.0, nonfinite=2.0)
    assert mapped(lambda a, b: a + b, first, second) == added

    def mean(values, weights):
        return np.average(values, weights=weights)

    assert averaged([first, second], mean) == LevelFigures(2, reconstruction=4.0, targets=2.0, loss=3.0)


def strings_of_code(tree):
    """(line, text) of every string in a module but docstrings; a formatted one with {} for its values."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(texts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docstrings | parts):
            yield node.lineno, node.value


KINDS = (LevelFigures, HeldOutLevel, GuessFigures, TrainingFigures, Measurement, ProbeFigures)
ENDS = "|".join(sorted({field.name for kind in KINDS for field in fields(kind) if field.default is None}))
NAME = re.compile(rf"(?<![\w/])(train|val|baseline)/|/({ENDS})\b")
"""the beginning of a figure's name, or the end"""


def names_in_code(source):
    """Lines that make the name of a figure or take one apart."""
    tree = ast.parse(source)
    found = {line for line, text in strings_of_code(tree) if NAME.search(text)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        takes_apart = called in ("split", "rsplit", "partition", "rpartition") and "/" in strings
        looks_at_ends = called in ("endswith", "startswith") and any(NAME.search(text) for text in strings)
        reads_number = called == "int" and re.search(r"\b(level|name)\w*\[-1\]", ast.unparse(node))
        if takes_apart or looks_at_ends or reads_number:
            found.add(node.lineno)
    return sorted(found)


@pytest.mark.parametrize(
    "line",
    ['row["val/loss"]', 'f"baseline/{level}/infill"', 'f"val/{name}"', 'name.split("/")', 'name.endswith("/loss")',
     'name.startswith("val/level")', 'name.partition("/")', "int(level[-1])", 'f"{part}/loss"'],
)  # fmt: skip
def test_the_search_finds(line):
    assert names_in_code(line) == [1]


def test_only_one_file_makes_and_reads_names():
    allowed = ROOT / "nnunet_mim/pretraining/monitoring/figures.py"  # the package may be installed elsewhere
    modules = [path for path in (ROOT / "nnunet_mim").rglob("*.py") if path != allowed]
    modules += (ROOT / "benchmarks").glob("*.py")
    found = {path.relative_to(ROOT).as_posix(): names_in_code(path.read_text()) for path in modules}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert len(names_in_code(allowed.read_text())) > 10
