"""`--config` files and bench.yaml changed at random: they are read as they are meant, or refused in one line."""

import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nnunet_mim.benchmarking.bench_file import Bench, read_bench
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.configure import merge_settings
from nnunet_mim.system.untrusted import read_yaml

CONFIG = yaml.safe_dump(PretrainConfig().to_dict(), sort_keys=False, default_flow_style=None)
BENCH = """\
output: results
datasets: {501: {folds: [0, 3]}, Dataset502_X: {configuration: 3d_lowres}}
arms:
  MiM: {plans: MyPlans, checkpoint: "runs/{dataset}/fold_{fold}.pth", settings: {lr: 1e-3}}
  Scratch:
  Stock: {trainer: nnUNetTrainer, plans: nnUNetPlans}
labels: [1%, 20, all]
seeds: 3
iterations: 1000
iterations_per_epoch: 100
device: cuda
gpus: [0, 2]
nsd_tolerance_mm: 2
allow_seen: true
test: [504]
"""
FILES = {"config": CONFIG, "bench": BENCH}
JUNK = (
    "", "null", "true", "on", "0", "-1", "0.5", "1e3", "1e999", ".nan", ".inf", "-.inf", "010", "0x10", "1:30", "1_000",
    "9" * 30, "9" * 400, "x", "''", "'a b'", "\xe9", "\x1b[2J", "\x00", "\ufeff", "[]", "{}", "[[]]", "[1]",
    "[0, 0, 0]",
    "{a: 1}", "{1: 1}", "{? [1] : 1}", "{? {a: 1} : 1}", "&a [*a]", "*a", "&a 1", "!!binary aGVsbG8=", "!!set {501}",
    "!!python/name:os.system x", "!!bool x", "!!str 5", "!!int x", "!!float x",
    "!!timestamp 2001-13-45", "2001-01-01",
    "2001-01-01 10:00:00", "{<<: {a: 1}}", "[", "{", "'", '"', ": :", "- -", "? ?", "| x", "> x", "% x", "@", "`",
    "{fold.real}", "'{fold:9999999999}'", "[1%, 1%]", "'" + "x" * 500 + "'", "[" * 60 + "]" * 60,
)  # fmt: skip


def read(name, path):
    """What the commands make of a file, before they look at anything else."""
    if name == "bench":
        return read_bench(path)
    found = merge_settings(read_yaml(path))
    return PretrainConfig.from_dict({key: value for key, value in found.items() if key != "network"})


def check(name, path, content):
    """A file is taken or refused in one printable line that names it or a setting. Returns what was taken."""
    path.write_bytes(content)
    began = time.monotonic()
    try:
        result, said = read(name, path), "nothing"
    except MiMError as error:
        result, said = None, str(error)
    assert time.monotonic() - began < 5
    assert len(said.splitlines()) == 1
    assert len(said) < 1500
    return result


def with_value(name, line, word, value):
    """The file with one word of one line exchanged for another value."""
    lines = FILES[name].split("\n")
    number = int(line * len(lines))
    words = lines[number].split(" ")
    words[int(word * len(words))] = value
    lines[number] = " ".join(words)
    return "\n".join(lines).encode(errors="surrogatepass")


def with_bytes(name, changes):
    content = bytearray(FILES[name].encode())
    for share, byte in changes:
        content[int(share * len(content))] = byte
    return bytes(content)


SHARES = st.floats(0, 1, exclude_max=True)
WORDS = {"name": st.sampled_from(sorted(FILES)), "line": SHARES, "word": SHARES, "value": st.sampled_from(JUNK)}
BYTES = {"name": st.sampled_from(sorted(FILES)),
         "changes": st.lists(st.tuples(SHARES, st.integers(0, 255)), min_size=1, max_size=3)}  # fmt: skip
QUIET = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


def test_the_files_as_they_are(tmp_path):
    assert isinstance(check("bench", tmp_path / "a.yaml", BENCH.encode()), Bench)
    assert check("config", tmp_path / "a.yaml", CONFIG.encode()) == PretrainConfig()
    assert check("config", tmp_path / "a.yaml", CONFIG.encode("utf-16")) == PretrainConfig()


@settings(max_examples=60, **QUIET)
@given(**WORDS)
@example("config", 0.5, 0.5, "!!timestamp 2001-13-45").via("test_words_at_length")
@example("config", 0.5, 0.5, "!!bool x").via("test_words_at_length")
def test_words(tmp_path, name, line, word, value):
    check(name, tmp_path / "a.yaml", with_value(name, line, word, value))


@settings(max_examples=30, **QUIET)
@given(**BYTES)
def test_bytes(tmp_path, name, changes):
    check(name, tmp_path / "a.yaml", with_bytes(name, changes))


@pytest.mark.parametrize("name", FILES)
def test_every_line_with_all_junk(tmp_path, name):
    """In place of the value of a line at the top: no traceback, and no number that is none."""
    keys = [line.split(":")[0] for line in FILES[name].splitlines() if line[0].isalpha()]
    for number, value in enumerate(JUNK):
        key = keys[number % len(keys)]
        kept = [line for line in FILES[name].splitlines() if not line.startswith(f"{key}:")]
        check(name, tmp_path / "a.yaml", "\n".join([*kept, f"{key}: {value}"]).encode(errors="surrogatepass"))


@pytest.mark.long
@settings(max_examples=600, **QUIET)
@given(**WORDS)
def test_words_at_length(tmp_path, name, line, word, value):
    check(name, tmp_path / "a.yaml", with_value(name, line, word, value))


@pytest.mark.long
@settings(max_examples=400, **QUIET)
@given(**BYTES)
def test_bytes_at_length(tmp_path, name, changes):
    check(name, tmp_path / "a.yaml", with_bytes(name, changes))
