"""Who may import whom (docs: CONTRIBUTING.md), checked on the source without running it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nnunet_mim"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# A part imports itself and parts on lower layers; two parts of one layer never import each other.
# Modules directly in the package are layer 0 and may import each other.
LAYERS = {
    "": 0,
    "system": 1,
    "networks": 2,
    "nnunet": 2,
    "reporting": 2,
    "checkpoint": 3,
    "pretraining": 4,
    "trainers": 4,
    "_nnunet_plugin": 5,
    "classification": 5,
    "preparation": 5,
    "inspection": 5,
    "benchmarking": 6,
    "api": 6,
    "demo": 7,
}
COMMAND_LINE_LIBRARIES = {"argparse", "click", "fire", "jsonargparse", "optparse", "typer", "tyro"}


def imported_names(source: str, package: str) -> Iterator[str]:
    """Absolute dotted names of everything `source`, a module of `package`, imports, at any depth.

    `from a import b` gives a.b: whether b is a module or a name in one makes no difference to the layers.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def names_in(module: str) -> list[str]:
    package = ".".join(["nnunet_mim", *Path(module).parts[:-1]])
    return list(imported_names((PACKAGE / module).read_text(), package))


def part_of(module: str) -> str:
    parts = Path(module).parts
    return parts[0] if len(parts) > 1 else ""


def part_of_name(name: str) -> str:
    """nnunet_mim.networks.vit_blocks.Block -> networks; nnunet_mim.config.PRESETS -> '' (directly in the package)."""
    second = name.split(".")[1]
    return second if (PACKAGE / second).is_dir() else ""


def may_import(importer: str, imported: str) -> bool:
    return importer == imported or LAYERS[imported] < LAYERS[importer]


def test_relative_and_nested_imports_are_understood():
    source = "from . import a\nfrom ..networks.x import y\nimport torch.nn as nn\ndef f():\n    from .b import c\n"
    names = set(imported_names(source, "nnunet_mim.trainers"))
    assert names == {
        "nnunet_mim.trainers.a",
        "nnunet_mim.networks.x.y",
        "torch.nn",
        "nnunet_mim.trainers.b.c",
    }


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("trainers", "networks", True),
        ("networks", "", True),
        ("trainers", "trainers", True),
        ("trainers", "pretraining", False),
        ("pretraining", "trainers", False),
        ("networks", "pretraining", False),
        ("", "networks", False),
        ("pretraining", "benchmarking", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


@pytest.mark.parametrize("module", MODULES)
def test_layers(module):
    part = part_of(module)
    assert part in LAYERS, f"{part}/ has no layer yet: add it to LAYERS and to CONTRIBUTING.md"
    names = [name for name in names_in(module) if name.startswith("nnunet_mim.")]
    wrong = [name for name in names if not may_import(part, part_of_name(name))]
    assert not wrong, f"{module} imports {', '.join(wrong)}"


READERS = {
    "checkpoint/torch_file.py": {"torch.load"},
    "checkpoint/share.py": {"safetensors.torch.load"},
    "classification/results.py": {"safetensors.torch.load"},  # of its own classifiers
    "benchmarking/training.py": {"torch.load"},  # of nnU-Net's own training
}


@pytest.mark.parametrize("module", MODULES)
def test_checkpoints_have_one_loader(module):
    """A checkpoint is read in one place, with all its checks."""
    tree = ast.parse((PACKAGE / module).read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {*calls, *names_in(module)}
    loading = ("torch.load", "torch.jit.load", "torch.serialization.load", "pickle.load", "pickle.loads")
    found = {name for name in names if name in loading or (name.startswith("safetensors") and "load" in name)}
    found |= {name for name in names if name.startswith("safetensors") and name.endswith("safe_open")}
    assert found == READERS.get(module, set())


@pytest.mark.parametrize("module", [module for module in MODULES if module != "system/untrusted.py"])
def test_json_and_yaml_of_others_have_one_reader(module):
    """Of limited size and depth. What a module has written itself a moment ago may be read by it."""
    tree = ast.parse((PACKAGE / module).read_text())
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    reading = ("json.load", "yaml.load", "yaml.safe_load", "yaml.full_load", "load_json(")
    found = [call for call in calls if call.startswith(reading) and not call.startswith("json.loads(json.dumps(")]
    assert found == (["json.loads(text)"] if module == "settings.py" else [])  # of a command line


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith("cli.py")])
def test_command_line_stays_in_cli(module):
    roots = {name.split(".")[0] for name in names_in(module)}
    assert not roots & COMMAND_LINE_LIBRARIES
    tree = ast.parse((PACKAGE / module).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    takes_args = [
        function.name
        for function in functions
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if argument.arg == "args"
    ]
    assert not takes_args, f"{module}: {', '.join(takes_args)} should get explicit arguments or a config"


def test_package_imports_nothing_and_registration_only_os():
    assert names_in("__init__.py") == []
    assert names_in("_register.py") == ["os"]


def test_config_is_standard_library_only():
    roots = {name.split(".")[0] for name in names_in("config.py")}
    assert roots <= set(sys.stdlib_module_names) | {"nnunet_mim"}


def test_light_imports_load_neither_torch_nor_nnunet():
    program = (
        "import sys, nnunet_mim, nnunet_mim.config, nnunet_mim._register;"
        "print([name for name in ('torch', 'numpy', 'nnunetv2') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"
