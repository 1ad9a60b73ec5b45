"""The search for copies on real CT: every kind of copy is found, and no other patient is taken for one."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[3] / "benchmarks" / "leak_guard.py"
WINDOWS = ("wide", "narrow")


@pytest.fixture
def leak_guard():
    """The module, which is not part of the package."""
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_cases(leak_guard, shared_data):
    """Two CT of different patients, as `cases_in` names them."""
    return [case for case in leak_guard.cases_in(shared_data) if case[0] == "test"][:2]


@pytest.mark.long
def test_copies_of_real_ct_are_found_and_no_other_patients(leak_guard, shared_data):
    found = leak_guard.measured(shared_data, n_copied=3, n_images=20)
    assert (found["copies_of"], found["pairs"] > 100) == (3, True)
    assert found["small_not_compared"] == [20, 20]
    for rates in (found["variants"], found["narrow_window"]):
        assert len(rates) == 17
        assert {name: rate for name, rate in rates.items() if rate < 0.95} == {}
    assert (found["false_alarms"], found["alarms"]) == (0, {window: [] for window in WINDOWS})


def test_a_copy_that_is_none_lowers_the_rate(leak_guard, two_cases, monkeypatch):
    """Without that the figures above could not fall."""
    other = leak_guard.read(two_cases[1][2])
    kinds = lambda *image: [("the same", *image), ("another patient", *other)]  # noqa: E731
    monkeypatch.setattr(leak_guard, "copies", kinds)
    rates = leak_guard.hit_rates(two_cases[:1])
    assert {window: rates[window]["the same"] for window in WINDOWS} == {"wide": 1, "narrow": 1}
    assert {window: rates[window]["another patient"] for window in WINDOWS} == {"wide": 0, "narrow": 0}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_patient_who_is_there_twice_is_an_alarm(leak_guard, two_cases, window):
    first, second = (leak_guard.at_own_spacing(*leak_guard.read(path), window) for _, _, path in two_cases)
    assert leak_guard.alarms(np.array([first, second])) == []
    assert leak_guard.alarms(np.array([first, second, first, first])) == [(2, 0), (3, 0), (3, 2)]
