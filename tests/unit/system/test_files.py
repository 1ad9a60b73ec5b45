"""A file is replaced as a whole or not at all."""

import csv
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.system.files import atomic_file, csv_text, write_atomically


def test_the_former_file_stays_until_all_is_written(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"former"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_error_leaves_the_former_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(path, temporary):
    with atomic_file(path, temporary) as file:
        file.write(b"new")
        assert temporary.exists()
        raise KeyboardInterrupt


def test_an_interruption_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"former")
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, tmp_path / "b.tmp")
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


@given(st.lists(st.lists(st.text() | st.integers() | st.floats(), min_size=1), min_size=1))
def test_no_cell_of_a_table_is_a_formula_and_everything_else_stays(rows):
    text = csv_text(rows)
    found = list(csv.reader(io.StringIO(text, newline="")))
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        for cell, value in zip(row, wanted, strict=True):
            shown = str(value).replace("\r", "\\r")
            assert cell in (shown, f"'{shown}")
            if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
                float(cell)


@pytest.mark.parametrize("formula", ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "-1+1", "=-1"])
def test_a_formula_is_a_text(formula):
    assert next(csv.reader(io.StringIO(csv_text([[formula]]), newline="")))[0] == f"'{formula}"


@pytest.mark.parametrize("number", ["-1", "+0.5", "-1e-3", "-inf", "nan", "1"])
def test_a_number_stays(number):
    assert csv_text([[number]]) == f"{number}\n"


def test_a_carriage_return_begins_no_row():
    assert csv_text([["\r=1", "a\rb"]]) == "\\r=1,a\\rb\n"
