"""A pretraining and a finetuning compute the figures in numbers.json, up to rounding.

`python benchmarks/same_numbers.py --against COMMIT` compares bit for bit, on one machine. With the instructions of
another CPU (ATEN_CPU_CAPABILITY=default, DNNL_MAX_CPU_ISA=SSE41) losses differ by 1e-6, a thousandth of what is allowed
here. Learning rates and counts (of crops, of masked tokens with tissue) are equal everywhere.
"""

import csv
import io

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TOLERANCE = 1e-3
"""of a loss, relative for those above 1"""
COARSE = {"alignment_top1": 0.1, "dice": 0.1, "dice_1": 0.1, "rank": 0.5, "grad_norm": 0.02}
"""last word of a figure that jumps where two values are nearly equal, or that sums over all rounding"""
EXACT = ("iteration", "lr", "targets", "padded_share", "flat_share", "skipped", "unread", "Dataset901_Labelled",
         "Dataset902_Images", "alignment_chance")  # fmt: skip


@pytest.fixture(scope="module")
def computed(same_numbers, tmp_path_factory):
    """Folder, and figures by name."""
    folder = tmp_path_factory.mktemp("numbers")
    return folder, same_numbers.compute(same_numbers.ROOT, folder)


def assert_same_table(found, stored):
    """Two CSV texts have the same columns and iterations, and nearly the same figures."""
    rows, before = (list(csv.DictReader(io.StringIO(text))) for text in (found, stored))
    assert list(rows[0]) == list(before[0])
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in before]
    for row, row_before in zip(rows, before, strict=True):
        for name, text in row_before.items():
            last = name.split("/")[-1]
            tolerance = COARSE.get(last, TOLERANCE)
            allowed = {"rel": 1e-5, "abs": 1e-9} if last in EXACT else {"rel": tolerance, "abs": tolerance}
            where = f"{name} at iteration {row['iteration']}"
            assert (row[name] == "") == (text == ""), where
            if text:
                assert float(row[name]) == pytest.approx(float(text), **allowed), where


@pytest.mark.parametrize("part", ["train.csv", "val.csv"])
def test_pretraining(computed, frozen, part):
    frozen("numbers.json", part, computed[1][part], assert_same_table)


def test_the_best_weights_are_kept(computed, same_numbers):
    """Here those of the last measurement."""
    run = same_numbers.pretraining_folder(computed[0])
    best, final = (same_numbers.load(run / f"checkpoint_{name}.pth") for name in ("best", "final"))
    assert set(best) == set(final)
    assert best["provenance"]["iterations"] == same_numbers.ITERATIONS


def test_finetuning(computed, frozen):
    losses = [float(value) for name, value in computed[1].items() if name.startswith("finetuning loss")]

    def compare(found, stored):
        assert found == pytest.approx(stored, rel=0, abs=TOLERANCE)

    frozen("numbers.json", "finetuning losses", losses, compare)
