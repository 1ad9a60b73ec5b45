"""Facts about the project that must agree with each other."""

import ast
import re
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import nnunet_mim

PROJECT = Path(__file__).parents[2]
FOLDERS = ["nnunet_mim", "tests", "docs", "benchmarks", "packaging", ".ci"]
SOURCES = sorted(path for folder in FOLDERS for path in (PROJECT / folder).rglob("*.py"))
TEXTS = sorted(
    [path for folder in FOLDERS for path in (PROJECT / folder).rglob("*") if path.suffix in {"", ".md", ".py", ".pth"}]
    + [path for path in PROJECT.iterdir() if path.suffix in {".md", ".py", ".toml", ".cff", ".in"}]
)
HOME_PATH = re.compile(r"(?<![\w./-])/(?:home|root|work|mnt|Users)/\w")


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def test_version_is_the_same_everywhere():
    assert version("nnunet_mim") == nnunet_mim.__version__
    latest = re.search(r"^## \[(.+?)\]", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest is not None
    assert latest.group(1) == nnunet_mim.__version__


@pytest.mark.parametrize(
    "command",
    [
        "mim_benchmark",
        "mim_classify",
        "mim_convert",
        "mim_demo",
        "mim_export",
        "mim_inspect",
        "mim_plan",
        "mim_prepare",
        "mim_pretrain",
    ],
)
def test_console_scripts_point_at_a_function(command):
    (script,) = entry_points(group="console_scripts", name=command)
    source = PROJECT.joinpath(*script.module.split(".")).with_suffix(".py")
    functions = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert script.attr in functions


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_path_of_somebodys_machine():
    found = [name_of(path) for path in TEXTS if path.is_file() and HOME_PATH.search(path.read_text(errors="replace"))]
    assert not found


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in (PROJECT / "nnunet_mim").rglob("*.py")}
    missing = [name_of(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert missing == ["nnunet_mim/_nnunet_plugin"], "a folder without __init__.py is left out of the wheel"


def test_test_folders_are_not_packages():
    assert not list((PROJECT / "tests").rglob("__init__.py")), "tests/packaging would hide the library `packaging`"
