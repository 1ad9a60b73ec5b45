"""What users see of the package, found without knowing where its modules lie.

Commands are those of pyproject.toml. Expectations are JSON files beside the tests. A new setting is named in
LATER_SETTINGS, a new flag in ADDED of test_commands.py. After another deliberate change `MIM_FREEZE=1 pytest FILE`
writes anew what differs; the difference in git shows what has changed. Put back digits that differ for the machine
alone.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = (
    "-d", "901", "902", "-p", "nnUNetPlans", "-f", "0", "-device", "cpu", "--preset", "tiny", "--view", "16",
    "--iterations", "4", "--batch", "1", "--workers", "0", "--seed", "3", "--set", "network.embed_dims=3,3,6,6",
    "network.depths=1,1,1,1", "network.num_heads=1", "network.decoder_embed_dim=6", "network.decoder_depth=1",
    "network.decoder_num_heads=1", "network.strides=[[1,1,1],[2,2,2],[2,2,2],[2,2,2]]", "n_children=2,1",
    "val_every=2", "save_every=1", "val_crops=2", "probe_every=4",
)  # fmt: skip
"""a pretraining of seconds; that of `old` too"""
LATER_SETTINGS = ("decoder", "decoder_phase", "unet_every", "unet_views", "unet_weight")
"""which the stored files do not have: a new setting is named here"""


@pytest.fixture(scope="session")
def same_numbers():
    """benchmarks/same_numbers.py, whose made-up datasets these tests use too."""
    spec = importlib.util.spec_from_file_location("same_numbers", ROOT / "benchmarks" / "same_numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def scripts():
    """Name of every command → (module, function)."""
    table = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].partition("\n[")[0]
    entries = re.findall(r'^(\w+) = "([\w.]+):(\w+)"', table, re.MULTILINE)
    return {name: (module, function) for name, module, function in entries}


@pytest.fixture(scope="session")
def command(scripts):
    """command(name, *arguments) → exit code."""

    def run(name, *arguments):
        module, function = scripts[name]
        return getattr(importlib.import_module(module), function)([str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def datasets(tmp_path_factory, same_numbers):
    """nnU-Net folders with the made-up datasets 901 (5 cases, labelled) and 902 (8 cases); not to be written to."""
    folder = tmp_path_factory.mktemp("datasets")
    same_numbers.write_dataset_folders(folder)
    return folder


@pytest.fixture
def work(datasets, tmp_path, monkeypatch, same_numbers):
    """A copy of the datasets; nnU-Net's variables point at it, and it is the working directory."""
    shutil.copytree(datasets, tmp_path, dirs_exist_ok=True)
    environment = same_numbers.environment(ROOT, tmp_path)
    for name in os.environ:
        if name.lower().startswith("nnunet_"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def small_run(datasets, tmp_path_factory, same_numbers):
    """A small pretraining as processes of their own: stopped by SIGTERM after two iterations, then continued.

    `folder` of nnU-Net's folders, `run` folder, `stopped` and `continued` processes, and `latest`: a copy of the run
    folder when it was stopped.
    """
    folder = tmp_path_factory.mktemp("small_run")
    shutil.copytree(datasets, folder, dirs_exist_ok=True)
    run, latest = same_numbers.pretraining_folder(folder), folder / "stopped"
    stopped = same_numbers.start(ROOT, folder, "child", "stopping", 2, *SMALL)
    shutil.copytree(run, latest)
    continued = same_numbers.start(ROOT, folder, "child", "stopping", 0, *SMALL, "--c")
    return SimpleNamespace(folder=folder, run=run, latest=latest, stopped=stopped, continued=continued)


@pytest.fixture(scope="session")
def small():
    """Options of `small_run`."""
    return SMALL


@pytest.fixture(scope="session")
def one_iteration():
    """Options of `small_run`, ended after one iteration and without its report."""
    changed = {"probe_every=4": "probe_every=0"}
    options = [changed.get(option, option) for option in SMALL]
    options[options.index("--iterations") + 1] = "1"
    return options


@pytest.fixture(scope="session")
def old():
    """Folder of files that an earlier state of the code has written."""
    return HERE / "old"


@pytest.fixture(scope="session")
def without_removed():
    """without_removed(value): nested mappings and lists without the settings that are gone on purpose, see
    docs/adr/0006-what-was-removed.md, or came later.
    """
    removed = ("flat_fraction", "skip_window", *LATER_SETTINGS)

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(v) for key, v in value.items() if key not in removed}
        return [strip(v) for v in value if v not in removed] if isinstance(value, list) else value

    return strip


@pytest.fixture(scope="session")
def frozen(without_removed):
    """frozen(file, name, found, compare=equal): what was found is what the file holds under this name.

    With MIM_FREEZE=1 the file is changed where they differ.
    """

    def equal(found, stored):
        assert without_removed(found) == without_removed(stored)

    def check(file, name, found, compare=equal):
        path = HERE / file
        stored = json.loads(path.read_text())
        found = json.loads(json.dumps(found))
        try:
            compare(found, stored[name])
        except (AssertionError, KeyError):
            if os.environ.get("MIM_FREEZE") != "1":
                raise
            path.write_text(json.dumps({**stored, name: found}, indent=1, sort_keys=True) + "\n")

    return check
