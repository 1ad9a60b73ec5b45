"""JSON and YAML of others: what is usable is read as it is, and what would fill memory or time is refused at once."""

import json
import os
import signal
import threading
import time
from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nnunet_mim.benchmarking.bench_file import read_bench
from nnunet_mim.benchmarking.cli import main as mim_benchmark
from nnunet_mim.checkpoint.format import load_checkpoint
from nnunet_mim.checkpoint.published import read_published
from nnunet_mim.classification.labels import read_labels
from nnunet_mim.classification.results import load_weights, read_predictions
from nnunet_mim.errors import MiMError, printable, printable_lines
from nnunet_mim.nnunet.cases import read_properties
from nnunet_mim.nnunet.documents import read_dataset_json, read_fingerprint, read_plans
from nnunet_mim.nnunet.source import plans_in
from nnunet_mim.pretraining.cli import main as mim_pretrain
from nnunet_mim.system.untrusted import check_extent, leaves, parse_json, read_json, read_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=30,
)

BOMBS = {
    "deep lists": "[" * 100_000,
    "deep lists that end": "[" * 60_000 + "]" * 60_000,
    "deep objects": '{"a":' * 100_000,
    "deeper than any file": "[" * 100 + "]" * 100,
    "many values": "[" + "0," * 20_000_000 + "0]",
    "many lists": "[" + "[]," * 10_000_000 + "[]]",
    "900,000 empty objects": "[" + "{}," * 899_999 + "{}]",
    "900,000 empty lists": "[" + "[]," * 899_999 + "[]]",
    "a long number": "1" * 10_000_000,
    "a number of 4000 digits": '{"a": ' + "1" * 4000 + "}",
}

YAML_BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghij")),
    "an alias of itself": "a: &a [*a]\n",
    "a merged mapping": "a: &a {x: 1}\nb: {<<: *a}\n",
    "deep lists": "a: " + "[" * 30_000,
    "deep objects": "{a: " * 5_000,
    "deeper than any file": "a: " + "[" * 60 + "]" * 60,
    "a date that cannot be": "a: 2001-13-45\n",
    "a long number": "a: " + "9" * 20_000,
    "a long file": "a: 1\n" * 100_000,
    "a Python object": "a: !!python/object/apply:os.mkdir [trap]\n",
    "no text": "a: \x00\n",
    "an octal number": "iterations: 0100\n",
    "a number to base 60": "iterations: 1:30\n",
    "NaN": "learning_rate: .nan\n",
    "infinity": "learning_rate: 1e999\n",
    "bytes": "tag: !!binary aGVsbG8=\n",
    "a set": "datasets: !!set {501}\n",
    "a name that is no text": "a: {true: 1}\n",
    "many names": "".join(f"{n:x}:\n" for n in range(6000)) + "1:\n",
}


@pytest.fixture
def refused():
    """refused(read, path, …): the one line with which something refuses a file within a second."""

    def check(read, path, *args):
        began = time.process_time()
        with pytest.raises(MiMError) as error:
            read(path, *args)
        assert time.process_time() - began < 1
        assert str(path) in str(error.value)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 1000
        return str(error.value)

    return check


@given(PLAIN)
def test_json_is_what_it_stands_for(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@given(st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), st.booleans() | st.lists(st.integers(-(2**63), 2**63 - 1))))
def test_yaml_is_what_it_stands_for(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "a.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(value))))
    assert read_yaml(path) == value


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("read", [read_json, read_plans, read_fingerprint, read_dataset_json])
def test_json_that_explodes(tmp_path, refused, kind, read):
    path = tmp_path / "plans.json"
    path.write_text(BOMBS[kind])
    refused(read, path)


def test_a_name_that_is_there_twice(tmp_path, refused):
    path = tmp_path / "plans.json"
    path.write_text('{"a": {"spacing": [1], "b": 2, "spacing": [3]}}')
    assert "spacing is there twice" in refused(read_json, path)
    names = ", ".join(f'"{number}": 0' for number in range(100_000))
    path.write_text(f'{{{names}, "99999": 1}}')
    assert "99999 is there twice" in refused(read_json, path)


def test_json_larger_than_any(tmp_path, refused):
    path = tmp_path / "plans.json"
    with path.open("wb") as file:
        file.truncate(10**10)  # a hole: nothing is on the disk
    assert "larger than" in refused(read_json, path)


@pytest.mark.parametrize("kind", YAML_BOMBS)
def test_yaml_that_explodes(tmp_path, monkeypatch, refused, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(YAML_BOMBS[kind])
    refused(read_yaml, path)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", ["aliases", "deep lists", "a date that cannot be"])
def test_commands_refuse_yaml_in_one_line(tmp_path, monkeypatch, capsys, kind):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text(YAML_BOMBS[kind])
    assert mim_pretrain(["-d", "1", "-device", "cpu", "--config", str(path)]) == mim_benchmark(["run", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") and str(path) in line for line in lines)


def test_what_holds_itself_or_much_by_repetition():
    itself = []
    itself.append(itself)
    wide = "x"
    for _ in range(30):
        wide = [wide] * 3
    tower = [[]]
    for _ in range(39):  # each is known already when the next is looked at
        tower.append([tower[-1]])
    for bad in (itself, {"a": itself}, wide, [*tower, [[[tower[-1]]]]]):
        with pytest.raises(ValueError, match="nested too deep or too large"):
            check_extent(bad)
    small = wide
    for _ in range(20):
        small = small[0]
    check_extent([small] * 2)  # 3 ** 10 values, twice


def test_leaves_have_names():
    content = {"a": {"b": [1, (2,)]}, "c": None, "d": []}
    assert list(leaves(content)) == [("a.b.0", 1), ("a.b.1.0", 2), ("c", None)]
    assert list(leaves(5, "x")) == [("x", 5)]


@given(st.text())
def test_text_for_a_terminal_is_one_line_without_control(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 201
    if text.isprintable() and len(text) <= 200:
        assert shown == text


def test_escape_sequences_are_shown():
    assert printable("\x1b[2J\u202eevil\r\n") == r"\x1b[2J\u202eevil\r\n"
    assert printable_lines("a\x1b\nb\r") == "a\\x1b\nb\\r"


@pytest.fixture
def pipe(tmp_path):
    """A pipe that nobody writes to. What reads it is ended after some seconds, in place of waiting for ever."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes in the file system")

    def late(*_):
        raise TimeoutError("it waits")

    os.mkfifo(tmp_path / "nnUNetPlans.json")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield tmp_path / "nnUNetPlans.json"
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


READERS = {
    "json": read_json, "plans": read_plans, "fingerprint": read_fingerprint, "dataset": read_dataset_json,
    "properties": read_properties, "labels": lambda path: read_labels(path, ["lesion"]),
    "predictions": read_predictions, "checkpoint": load_checkpoint, "published": read_published,
}  # fmt: skip


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_pipe_is_not_waited_for(pipe, refused, read):
    assert "no regular file" in refused(read, pipe)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_device_is_not_read(tmp_path, refused, read):
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "no regular file" in refused(read, tmp_path / "zero")


def test_weights_that_are_a_pipe(pipe):
    with pytest.raises(ValueError, match="no regular file"):
        load_weights(pipe, "")


def test_an_experiment_may_come_out_of_a_pipe(pipe):
    writer = threading.Thread(target=pipe.write_text, args=("datasets: [501]\narms: [MiM]\n",))
    writer.start()
    assert read_bench(pipe).arms[0].name == "MiM"
    writer.join()


def test_a_pipe_among_the_files_of_a_dataset(pipe):
    with pytest.raises(MiMError, match=r"nnUNetPlans\.json .*no regular file"):
        plans_in(pipe.parent)


def test_a_config_may_come_out_of_a_pipe(pipe):
    """A shell's <(…) is one."""
    writer = threading.Thread(target=pipe.write_text, args=("iterations: 5",))
    writer.start()
    assert read_yaml(pipe) == {"iterations": 5}
    writer.join()
