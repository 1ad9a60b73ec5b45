"""What trainings of an experiment keep in JSON: with junk in any place it is taken, or refused in one line."""

import json

import pytest

from nnunet_mim.benchmarking import documents
from nnunet_mim.benchmarking.matrix import case_value, false_alarms
from nnunet_mim.benchmarking.training import KEY, KeptTraining, _total_cost
from nnunet_mim.checkpoint.locate import POINTER, _final_checkpoint

JUNK = [
    ..., None, True, -1, 0.5, 5, 1e308, float("inf"), float("nan"), "", "x", "\0", [], [[]], [1], {}, {"x": 1},
    {"v": {}},
]  # fmt: skip
METRICS = {"dice": 0.5, "hd95": 2.0, "nsd": 0.5, "n_ref": 3, "n_pred": 2}
COST = {"began": 1.0, "seconds": 5.0, "peak_bytes": 7, "parameters": 9, "device": "cpu"}
RESULT = {
    "cases": {"v": {"1": METRICS}}, "curve": [0.1, 0.2], "names": {"1": "organ"}, "tolerance": 1.0, "cost": COST,
    "tests": {"Dataset002_Y": {"w": {"1": METRICS}}},
}  # fmt: skip


@pytest.fixture
def mutations(junk):
    """mutations(content): a document with junk in place of each of its values, and in place of itself."""

    def every(content):
        yield from (value for value in JUNK if value is not ...)
        for path in junk.places(content):
            yield from (junk.put(content, path, value) for value in JUNK)

    return every


def use_cost(file):
    cost = _total_cost(file)
    return cost and cost["seconds"] / 3600 + cost["peak_bytes"] / 1e9 + cost["parameters"] / 1e6


def use_result(file):
    result = documents.read_result(file, ("v",))
    figures = [case_value(labels, metric) for labels in result["cases"].values() for metric in ("dice", "hd95", "nsd")]
    cost = result["cost"] and result["cost"]["seconds"] + result["cost"]["parameters"]
    return figures, false_alarms(result), cost, [result["names"].get(name, name).upper() for name in ("1", "2")]


def use_classifier(file):
    result = documents.read_kept(file, documents.CLASSIFIER_RESULT_SCHEMA)
    auroc = {name: f"{value:.3f}" for name, value in result["auroc"].items()}
    return result["seconds"] / 3600, auroc, set(result["seen"])


def use_seconds(file):
    return documents.read_kept(file, documents.CLASSIFIER_COST_SCHEMA)["seconds"] + 1.0


def use_key(file):
    training = KeptTraining()
    training.folder, training.key = file.parent, lambda: {"seed": 1, "checkpoint": "a"}
    file.rename(file.parent / KEY)
    return training.is_this_one()


def is_share(value):
    return type(value) in (int, float) and (value != value or 0 <= value <= 1)


def is_number(value):
    return type(value) in (int, float) and 0 <= value < float("inf")


def is_count(value):
    return type(value) is int and value >= 0


def is_metrics(value):
    distance = is_number(value["hd95"]) or (type(value["hd95"]) is float and value["hd95"] != value["hd95"])
    counts = is_count(value["n_ref"]) and is_count(value["n_pred"])
    return is_share(value["dice"]) and is_share(value["nsd"]) and distance and counts


def is_cost(value):
    numbers = all(is_number(value[name]) for name in ("seconds", "peak_bytes"))
    return numbers and is_count(value["parameters"]) and type(value["device"]) is str


def is_result(value):
    tests = value.get("tests", {}).values()
    alike = all(len({tuple(labels) for labels in cases.values()}) == 1 for cases in (value["cases"], *tests))
    labels = [labels for cases in (value["cases"], *tests) for labels in cases.values()]
    metrics = all(labels) and all(is_metrics(found) for own in labels for found in own.values())
    names = type(value["names"]) is dict and all(type(name) is str for name in value["names"].values())
    curve = value["curve"] != [] and all(map(is_share, value["curve"]))
    cost = value["cost"] == {} or is_cost(value["cost"])
    tolerance, cases = is_number(value["tolerance"]), {*value["cases"]} == {"v"}
    return alike and metrics and cases and names and curve and tolerance and cost


VALID = {
    "cost": lambda value: type(value) is list and all(is_cost(one) and is_number(one["began"]) for one in value),
    "result": is_result, "key": lambda value: type(value) is dict,
    "classifier result": lambda value: (
        is_number(value["seconds"])
        and all(map(is_share, value["auroc"].values()))
        and all(type(name) is str for name in value["seen"])
    ),
    "classifier cost": lambda value: is_number(value["seconds"]),
}  # fmt: skip
DOCUMENTS = {
    "cost": ([COST, COST], use_cost), "result": (RESULT, use_result), "key": ({"seed": 1, "checkpoint": "a"}, use_key),
    "classifier result": ({"seconds": 1.5, "auroc": {"ill": 0.5}, "seen": ["a"]}, use_classifier),
    "classifier cost": ({"seconds": 1.5}, use_seconds),
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_mutation_is_misread(tmp_path, mutations, junk, name):
    """What is taken passes checks of its own, and what is refused is refused in one line."""
    whole, use = DOCUMENTS[name]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(whole))
    assert use(file)
    taken = 0
    for content in mutations(whole):
        file.write_text(json.dumps(content))
        if junk.taken(lambda _: (use(file),), tmp_path):
            assert VALID[name](content), content
            taken += 1
    assert taken > 0


def test_no_pointer_ends_in_a_traceback(tmp_path, mutations):
    for content in [*mutations({"checkpoint": "a"}), {"checkpoint": "x" * 5000}, {"checkpoint": "\ud800"}]:
        (tmp_path / POINTER).write_text(json.dumps(content))
        assert _final_checkpoint(tmp_path) is None
