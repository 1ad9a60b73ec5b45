"""Subsets, and tables from results made by hand."""

import csv
import io
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_mim.benchmarking.cell import Arm, Length, nested_subset
from nnunet_mim.benchmarking.few_shot_cli import settings_by_arm
from nnunet_mim.benchmarking.few_shot_report import control_of, every_value, markdown, reaches, write_report
from nnunet_mim.benchmarking.protocol import Protocol
from nnunet_mim.errors import MiMError

ARMS = (
    Arm("MiM", "nnUNetTrainerMiM", SimpleNamespace(), "a.pth"),
    Arm("Scratch", "nnUNetTrainerMiMScratch", SimpleNamespace()),
)
PROTOCOL = Protocol(ARMS, 0, (5, 20), 2, Length(4, 50, 5), {}, ("a",), ("x", "y"))


def figures(dice, hd95):
    return {"dice": dice, "hd95": hd95, "n_ref": 50, "n_pred": 50}


def result(dice, curve, leaked=(), alarm=math.nan):
    """Two cases, two labels; label 2 is nowhere in case y."""
    return {
        "cases": {
            "x": {"1": figures(dice, 2.0), "2": figures(dice + 0.2, 4.0)},
            "y": {"1": figures(dice, 6.0), "2": {"dice": alarm, "hd95": 99.0, "n_ref": 0, "n_pred": int(alarm == 0)}},
        },
        "curve": curve,
        "leaked": list(leaked),
        "names": {"0": "background", "1": "liver"},
    }


RESULTS = {
    (5, 0, "MiM"): result(0.50, [0.1, 0.3, 0.4, 0.5]),
    (5, 0, "Scratch"): result(0.40, [0.0, 0.1, 0.2, 0.3]),
    (5, 1, "MiM"): result(0.60, [0.0, 0.1, 0.1, 0.2]),
    (5, 1, "Scratch"): result(0.40, [0.0, 0.1, 0.2, 0.3]),
    (20, 0, "Scratch"): result(0.70, [0.1, 0.2, 0.3, 0.4]),
}


def cells(text, start):
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [part.strip() for part in line.strip("|").split("|")]


def test_table_by_hand():
    """Case x counts both labels, case y the only one it has: means of 0.50 are (0.60 + 0.50) / 2."""
    text = markdown(PROTOCOL, RESULTS)
    row = cells(text, "| 5 | MiM |")
    assert row[2:5] == ["2", "60.00 ± 7.07", "4.50 ± 0.00"]
    assert row[5].startswith("+15.00 [")
    assert row[6] == "[+15.00, +15.00]"
    assert row[8] == "100, > 200"
    assert cells(text, "| 5 | Scratch |")[2:] == ["2", "45.00 ± 0.00", "4.50 ± 0.00", "", "", "", ""]
    assert cells(text, "| 20 | Scratch |")[2:4] == ["1", "75.00"]
    assert "| 20 | MiM |" not in text
    by_label = text.split("Dice % of liver | Dice % of 2")[1]
    assert cells(by_label, "| 5 | MiM |")[2:] == ["55.00 ± 7.07", "75.00 ± 7.07"]
    assert "WARNING" not in text
    assert "Found where" not in text
    alarmed = markdown(PROTOCOL, {**RESULTS, (5, 0, "MiM"): result(0.50, [0.1, 0.3, 0.4, 0.5], alarm=0.0)})
    assert cells(alarmed, "| 5 | MiM |") == row, "Dice where there is nothing to find would be 0, or undefined"
    assert "- MiM, 5 labels, seed 0: 1 of 1" in alarmed
    seen = {**RESULTS, (20, 0, "MiM"): result(0.9, [0.9], leaked=["x"])}
    assert "WARNING: the pretraining has seen 1 of the validation cases (x first)" in markdown(PROTOCOL, seen)


def test_every_value_is_in_the_csv_and_files_are_written(tmp_path):
    rows = list(csv.DictReader(io.StringIO(every_value(RESULTS))))
    assert len(rows) == len(RESULTS) * 4
    assert rows[0] == {
        "labels": "5", "seed": "0", "arm": "MiM", "case": "x", "label": "1", "dice": "0.5", "hd95": "2", "n_ref": "50",
        "n_pred": "50",
    }  # fmt: skip
    write_report(PROTOCOL, RESULTS, tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "figure.png"}


def test_settings_for_all_mim_arms_and_for_one():
    arms = (*ARMS, Arm("Stock", "nnUNetTrainer", SimpleNamespace()))
    assert settings_by_arm({"Scratch.lr": 2, "lr": 1, "drop_path": 0.1}, arms) == {
        "MiM": {"lr": 1, "drop_path": 0.1},
        "Scratch": {"lr": 2, "drop_path": 0.1},
    }
    with pytest.raises(MiMError, match=r"--set Stock\.lr: no MiM arm Stock \(there are MiM, Scratch\)"):
        settings_by_arm({"Stock.lr": 1}, arms)
    with pytest.raises(MiMError, match="the length is that of --iterations"):
        settings_by_arm({"Scratch.num_epochs": 1}, arms)


def test_first_epoch_that_reaches_a_goal():
    assert reaches([0.1, 0.3, 0.2, 0.5], 0.3) == 2
    assert reaches([0.1, 0.3], 0.31) is None


def test_the_control_is_the_first_arm_without_pretraining():
    assert control_of(PROTOCOL) == "Scratch"


@given(st.integers(2, 30), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_subsets_are_nested_and_differ_by_seed(available, seed):
    cases = [f"case_{i:02d}" for i in range(available)]
    subsets = [nested_subset(cases, count, seed) for count in range(1, available + 1)]
    for smaller, larger in pairwise(subsets):
        assert set(smaller) < set(larger)
        assert len(larger) == len(smaller) + 1
    assert subsets[-1] == tuple(cases)


def test_other_seeds_draw_other_cases():
    cases = [f"case_{i:02d}" for i in range(40)]
    assert len({nested_subset(cases, 5, seed) for seed in range(10)}) == 10


@pytest.mark.parametrize("seed", [0, 1])
def test_cells_of_all_arms_have_the_same_cases(seed):
    protocol = Protocol(ARMS, 0, (1, 3), 2, Length(1, 1, 1), {}, ("a", "b", "c"), ("x",))
    found = protocol.cells()
    assert len(found) == 8
    assert found[1, seed, "MiM"].train_cases == found[1, seed, "Scratch"].train_cases
    assert found[3, seed, "MiM"].train_cases == ("a", "b", "c")
