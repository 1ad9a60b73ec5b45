"""Tables, pictures and pages from results made by hand."""

import csv
import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_mim.benchmarking.bench_figures import bars_figure, curves_figure
from nnunet_mim.benchmarking.bench_file import ArmSpec, Bench, DatasetSpec
from nnunet_mim.benchmarking.bench_report import write_bench_report
from nnunet_mim.benchmarking.cell import Arm, Cell
from nnunet_mim.benchmarking.guard import Findings
from nnunet_mim.benchmarking.matrix import Matrix, Place
from nnunet_mim.benchmarking.outcome import Outcome
from nnunet_mim.benchmarking.published_numbers import published_table
from nnunet_mim.benchmarking.tables import (
    _first_epoch_at,
    _latex_text,
    comparison_table,
    cost_table,
    every_value,
    label_table,
    main_table,
    markdown_table,
    notes,
    smooth,
    with_sd,
)
from nnunet_mim.classification.evaluation import holm

DATASET = "Dataset001_X"
SPECS = (ArmSpec("MiM", "nnUNetTrainerMiM", "P", "a.pth"), ArmSpec("Scratch", "nnUNetTrainerMiMScratch", "P"))


def figures(dice, hd95, n_ref=50, n_pred=50):
    return {"dice": dice, "hd95": hd95, "nsd": dice / 2, "n_ref": n_ref, "n_pred": n_pred}


def result(dice, curve, cases="xy", alarm=False):
    """Two cases, two labels; label 2 is nowhere in the second case."""
    first, second = cases
    return {
        "cases": {
            first: {"1": figures(dice, 2.0), "2": figures(dice + 0.2, 4.0)},
            second: {"1": figures(dice, 6.0), "2": figures(0.0 if alarm else math.nan, 99.0, 0, int(alarm))},
        },
        "curve": curve,
        "names": {"0": "background", "1": "liver"},
        "cost": {"seconds": 1800.0, "peak_bytes": 2e9, "parameters": 3_000_000, "device": "cpu"},
    }


RESULTS = {
    ("5", 0, "MiM"): result(0.50, [0.1, 0.3, 0.4, 0.5]),
    ("5", 0, "Scratch"): result(0.40, [0.0, 0.1, 0.2, 0.27]),
    ("5", 1, "MiM"): result(0.60, [0.0, 0.1, 0.1, 0.2]),
    ("5", 1, "Scratch"): result(0.40, [0.0, 0.1, 0.2, 0.27]),
    ("20%", 0, "Scratch"): result(0.70, [0.1, 0.2, 0.3, 0.4]),
}


@pytest.fixture
def outcome(tmp_path):
    """outcome(results, folds=…, seen=…): of the arms above; results by (labels, seed, arm), or with a fold in front."""

    def make(results=RESULTS, folds=(0,), seen=(), dataset=DATASET):
        bench = Bench((DatasetSpec(dataset, folds),), SPECS, ("5", "20%"), 2, 200, 50, 5, output=tmp_path / "out")
        source = SimpleNamespace(folder=tmp_path / dataset / "P_3d")
        cells = {
            Place(dataset, fold, labels, seed, spec.name): Cell(
                Arm(spec, source, spec.checkpoint), fold, ("a",) * count, ("x", "y"), seed, bench.length
            )
            for fold in folds for seed in range(2) for labels, count in (("5", 5), ("20%", 9 + fold)) for spec in SPECS
        }  # fmt: skip
        filled = {Place(dataset, *(key if len(key) == 4 else (0, *key))): value for key, value in results.items()}
        findings = {(dataset, fold, spec.name): Findings() for fold in folds for spec in SPECS}
        return Outcome(Matrix(bench, cells, "Scratch"), filled, {**findings, **dict(seen)})

    return make


def row_of(table, labels, arm):
    return next((row for row in table if row[:2] == [labels, arm]), None)


def test_main_table_by_hand(outcome):
    """Case x counts both labels, case y the only one it has: means of 0.50 are (0.60 + 0.50) / 2."""
    table = main_table(outcome(), DATASET)
    row = row_of(table, "5", "MiM")
    assert row[2:] == ["2", "60.00 ± 7.07", "4.50 ± 0.00", "30.00 ± 3.54"]
    assert row_of(table, "5", "Scratch")[2:] == ["2", "45.00 ± 0.00", "4.50 ± 0.00", "22.50 ± 0.00"]
    assert row_of(table, "20% (9)", "Scratch")[2:4] == ["1", "75.00"]
    assert row_of(table, "20% (9)", "MiM") is None
    compared = comparison_table(outcome(), DATASET)
    assert len(compared) == 2, "the control is compared with nothing, and without it no arm is"
    row = row_of(compared, "5", "MiM")
    assert row[2] == "2"
    assert row[3].startswith("+15.00 [")
    assert row[4] == "[+15.00, +15.00]"
    assert row[7] == "100, > 200"
    endless = outcome({**RESULTS, ("5", 1, "Scratch"): result(0.40, [math.nan] * 4)})
    assert row_of(comparison_table(endless, DATASET), "5", "MiM")[7] == "100, –", "the control's end is not known"
    assert {len(line) for line in compared} == {8}
    assert row_of(label_table(outcome(), DATASET), "5", "MiM")[2:] == ["55.00 ± 7.07", "75.00 ± 7.07"]
    assert label_table(outcome(), DATASET)[0][2:] == ["Dice % of liver", "Dice % of 2"]
    assert row_of(label_table(outcome(), DATASET, "hd95"), "5", "MiM")[2:] == ["4.00 ± 0.00", "4.00 ± 0.00"]
    assert row_of(label_table(outcome(), DATASET, "nsd"), "5", "MiM")[2:] == ["27.50 ± 3.54", "37.50 ± 3.54"]
    assert label_table(outcome(), DATASET, "hd95")[0][2] == "HD95 mm of liver"
    assert notes(outcome(), DATASET) == []


def test_what_is_found_where_nothing_is_has_a_dice_of_0_as_in_nnunet(outcome):
    """Case y has label 1 alone: its mean of 0.50 becomes that of 0.50 and 0; that of case x stays 0.60."""
    alarmed = outcome({**RESULTS, ("5", 0, "MiM"): result(0.50, [0.1, 0.3, 0.4, 0.5], alarm=True)})
    assert row_of(main_table(alarmed, DATASET), "5", "MiM")[3] == with_sd(np.array([[0.60, 0.25], [0.70, 0.60]]) * 100)
    assert row_of(label_table(alarmed, DATASET), "5", "MiM")[3] == with_sd(
        np.array([[0.70, 0.0], [0.80, np.nan]]) * 100
    )
    (line,) = notes(alarmed, DATASET)
    assert "Dataset001_X fold 0, labels 5, seed 0, MiM: 1 of 1" in line


def test_seen_cases_are_marked_in_every_table_and_named(outcome):
    seen = {(DATASET, 0, "MiM"): Findings(("x",))}
    marked = outcome(seen=seen)
    for table in (main_table, comparison_table, label_table, cost_table):
        assert row_of(table(marked, DATASET), "5", "MiM *") is not None
        assert row_of(table(marked, DATASET), "5", "MiM") is None
        assert (row_of(table(marked, DATASET), "5", "Scratch") is None) == (table is comparison_table)
    assert {(row["arm"], row["case"]) for row in csv.DictReader(io.StringIO(every_value(marked))) if row["seen"]} == {
        ("MiM", "x")
    }
    write_dataset_json(marked)
    text = write_bench_report(marked, {})
    for name in ("report.html", "table.tex", "table.md"):
        assert "WARNING: its pretraining has seen 1" in (marked.matrix.bench.output / name).read_text()
    assert not [line for line in text.splitlines() if "| MiM |" in line]
    assert notes(marked, DATASET) == [
        "MiM *: WARNING: its pretraining has seen 1 of the validation cases of fold 0 (x)"
    ]
    likely = outcome(seen={(DATASET, 0, "MiM"): Findings((), "", {"y": "Dataset800_Pool b"}, "2 have none")})
    assert row_of(main_table(likely, DATASET), "5", "MiM *") is not None
    assert notes(likely, DATASET)[1:] == [
        "MiM *: y is probably the same as Dataset800_Pool b", "MiM: seen cases of fold 0: 2 have none",
    ]  # fmt: skip
    assert {row["seen"] for row in csv.DictReader(io.StringIO(every_value(likely))) if row["case"] == "y"} == {
        "", "probably",
    }  # fmt: skip
    unsure = outcome(seen={(DATASET, 0, "MiM"): Findings((), "it does not say")})
    assert notes(unsure, DATASET)[0].endswith("is not sure: it does not say")


def test_folds_are_pooled_and_a_seed_counts_when_all_of_them_are_finished(outcome):
    results = {
        (fold, "5", seed, arm): result(0.5 + 0.1 * fold, [0.1, 0.3], cases="xy" if not fold else "uv")
        for fold in (0, 1) for seed in (0, 1) for arm in ("MiM", "Scratch")
    }  # fmt: skip
    assert row_of(main_table(outcome(results, (0, 1)), DATASET), "5", "MiM")[2:4] == ["2", "60.00 ± 0.00"]
    assert outcome(results, (0, 1)).values(DATASET, "5", [0, 1], "MiM", "dice").shape == (2, 4)
    del results[1, "5", 1, "MiM"]
    assert row_of(main_table(outcome(results, (0, 1)), DATASET), "5", "MiM")[2:4] == ["1", "60.00"]
    row = row_of(comparison_table(outcome(results, (0, 1)), DATASET), "5", "MiM")
    assert row[7] == "100, 100", "iterations of both folds, of the seed that both arms have"


def test_costs(outcome):
    row = row_of(cost_table(outcome(), DATASET), "5", "MiM")
    assert row[2:] == ["0.50", "1.00", "2.00", "3.00", "cpu"]
    assert len(cost_table(outcome({("5", 0, "MiM"): {**result(0.5, [0.1]), "cost": {}}}), DATASET)) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_corrected_ps_count_every_comparison_of_the_report(outcome):
    random = np.random.default_rng(0)

    def noisy(dice):
        cases = {f"c{i}": {"1": figures(float(dice + random.normal(0, 0.02)), 1.0)} for i in range(8)}
        return {**result(dice, [0.1]), "cases": cases}

    results = {(labels, 0, arm): noisy(0.6 if arm == "MiM" else 0.5) for labels in ("5", "20%") for _, arm in
               ((0, "MiM"), (0, "Scratch"))}  # fmt: skip
    found = outcome(results)
    plain = [found.comparisons[DATASET, labels, "MiM"][0].p for labels in ("5", "20%")]
    assert plain == [pytest.approx(2 / 2**8)] * 2, "all eight differences are positive"
    assert list(found.corrected_ps().values()) == [pytest.approx(4 / 2**8)] * 2


def test_every_value_is_in_the_csv(outcome):
    rows = list(csv.DictReader(io.StringIO(every_value(outcome()))))
    assert len(rows) == len(RESULTS) * 4
    row = next(
        r for r in rows if (r["labels"], r["arm"], r["case"], r["label"], r["seed"]) == ("5", "MiM", "x", "1", "0")
    )
    assert row == {
        "dataset": DATASET, "fold": "0", "labels": "5", "seed": "0", "arm": "MiM", "case": "x", "seen": "",
        "label": "1", "name": "liver",
        "dice": "0.5", "hd95": "2", "nsd": "0.25", "n_ref": "50", "n_pred": "50",
    }  # fmt: skip


def test_markdown_and_latex():
    assert markdown_table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert markdown_table([["a|b"], ["1"]]) == "| a/b |\n|---|\n| 1 |"
    assert _latex_text("50 % of a_b & > 3 ± 1") == r"50 \% of a\_b \& $>$ 3 $\pm$ 1"
    assert _latex_text("a\\b…x") == r"a\textbackslash{}b\ldots{}x"


def write_dataset_json(outcome):
    cell = next(iter(outcome.matrix.cells.values()))
    base = cell.arm.source.folder.parent
    base.mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, "liver": 1}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (base / "dataset.json").write_text(json.dumps(content))


def test_all_files_are_written_and_the_page_needs_no_other(outcome):
    made = outcome()
    write_dataset_json(made)
    left = Place(DATASET, 0, "20%", 0, "MiM")
    text = write_bench_report(made, {left: "out of <memory>"})
    output = made.matrix.bench.output
    assert {p.name for p in output.iterdir()} == {
        "table.md", "table.csv", "table.tex", f"figure_{DATASET}.png", "report.html"
    }  # fmt: skip
    assert (output / "table.md").read_text() == text
    assert "| 5 | MiM | 2 | 60.00 ± 7.07 |" in text
    page = (output / "report.html").read_text()
    assert "5 of 8 trainings are finished, 1 failed" in page
    assert "labels 20%, seed 0, MiM: out of &lt;memory&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    latex = (output / "table.tex").read_text()
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 5
    rows = [line for line in latex.splitlines() if line.startswith("5 & MiM")]
    assert [row.count("&") for row in rows] == [5, 7, 3, 3, 3]
    for heading in ("every label", "HD95 mm, every label", "NSD %, every label"):
        assert f"<h2>{DATASET}: {heading}</h2>" in page


def test_names_of_labels_do_not_break_the_files(outcome):
    name = "<script>alert(1)</script>|\n---\n\x1b[2J"
    results = {key: {**value, "names": {"0": "background", "1": name}} for key, value in RESULTS.items()}
    made = outcome(results)
    write_dataset_json(made)
    text = write_bench_report(made, {Place(DATASET, 0, "20%", 0, "MiM"): name})
    assert all(line.isprintable() for line in text.split("\n")), "it is printed too"
    assert "<script" not in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "<script" not in (made.matrix.bench.output / "report.html").read_text()
    assert "\x1b" not in (made.matrix.bench.output / "table.tex").read_text()


def test_published_numbers_stand_apart_with_their_source(outcome):
    assert published_table(DATASET) == []
    btcv = outcome(dataset="Dataset220_BTCV")
    write_dataset_json(btcv)
    text = write_bench_report(btcv, {})
    assert text.index("### Published elsewhere") > text.index("| labels | arm |")
    assert "| nnU-Net | 83.08 | five folds of nnU-Net, from random weights | nnU-Net, documentation" in text
    assert all(method and protocol and source for method, _, protocol, source in published_table("Dataset220_BTCV"))
    assert "published elsewhere" in (btcv.matrix.bench.output / "table.tex").read_text()
    assert [row[1] for row in published_table("Dataset003_Liver")] == ["Dice %", "80.09", "81.60", "82.34"]


def test_a_smooth_curve_by_hand():
    assert smooth([0.0, 0.3, 0.6, 0.9]) == pytest.approx([0.0, 0.15, 0.3, 0.6])
    assert smooth([math.nan, 0.3, math.nan]) == pytest.approx([math.nan, 0.3, 0.3], nan_ok=True)
    assert smooth([0.0] * 196 + [1.0] * 4)[-1] == 1.0
    assert smooth([0.0] * 296 + [1.0] * 4)[-1] == pytest.approx(4 / 6)


def test_first_epoch_that_reaches_a_goal():
    assert _first_epoch_at([0.1, 0.3, 0.2, 0.5], 0.3) == 2
    assert _first_epoch_at([0.1, 0.3], 0.31) is None


def test_figures_say_their_numbers(outcome):
    curves = curves_figure(outcome(), DATASET)
    assert "MiM 60.0 with 5" in curves.get_label()
    left = curves.axes[0]
    assert [line.get_label() for line in left.lines] == ["MiM", "Scratch"]
    assert left.lines[1].get_xydata().tolist() == [[5, pytest.approx(45)], [9, pytest.approx(75)]]
    bars = bars_figure(outcome(), DATASET)
    heights = [bar.get_height() for bar in bars.axes[0].patches]
    assert heights == pytest.approx([55, 75, 40, 60])
    assert bars_figure(outcome({("5", 0, "MiM"): RESULTS["5", 0, "MiM"]}), DATASET) is None
