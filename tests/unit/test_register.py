"""How the plugin folder gets into nnUNet_extTrainer (nnunet_mim/_register.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_mim._register import PLUGIN_FOLDER, register

PTH = Path(__file__).parents[2] / "packaging" / "nnunet_mim.pth"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "")  # so that what the test leaves there is undone
    monkeypatch.delenv("nnUNet_extTrainer")
    monkeypatch.delenv("NNUNET_MIM_NO_AUTOREGISTER", raising=False)


def test_sets_the_variable_to_a_folder_with_one_module():
    register()
    assert os.environ["nnUNet_extTrainer"] == PLUGIN_FOLDER
    assert [path.name for path in Path(PLUGIN_FOLDER).glob("*.py")] == ["nnunet_mim_plugin.py"]


@pytest.mark.parametrize("value", ["", " ", os.pathsep])
def test_an_empty_value_leaves_no_empty_entry(monkeypatch, value):
    monkeypatch.setenv("nnUNet_extTrainer", value)
    register()
    assert os.environ["nnUNet_extTrainer"] == PLUGIN_FOLDER


def test_the_users_folders_stay_in_front(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join(["first", "second"]))
    register()
    assert os.environ["nnUNet_extTrainer"].split(os.pathsep) == ["first", "second", PLUGIN_FOLDER]


@pytest.mark.parametrize("value", ["", "mine", PLUGIN_FOLDER, os.pathsep.join([PLUGIN_FOLDER, "mine"])])
def test_a_second_call_changes_nothing(monkeypatch, value):
    monkeypatch.setenv("nnUNet_extTrainer", value)
    register()
    once = os.environ["nnUNet_extTrainer"]
    register()
    assert os.environ["nnUNet_extTrainer"] == once
    assert once.split(os.pathsep).count(PLUGIN_FOLDER) == 1


@pytest.mark.parametrize(("value", "registers"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_opt_out(monkeypatch, value, registers):
    monkeypatch.setenv("NNUNET_MIM_NO_AUTOREGISTER", value)
    register()
    assert ("nnUNet_extTrainer" in os.environ) == registers


def test_pth_is_one_line_that_site_executes():
    lines = PTH.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import ")


@pytest.mark.parametrize("left_over", ["nothing", "an empty folder"])
def test_pth_is_silent_when_the_package_is_gone(tmp_path, left_over):
    (tmp_path / PTH.name).write_text(PTH.read_text())
    if left_over == "an empty folder":
        (tmp_path / "nnunet_mim" / "__pycache__").mkdir(parents=True)
    # -S: without the site-packages, so without any nnunet_mim; -I: without the current folder
    program = f"import os, site; site.addsitedir({str(tmp_path)!r}); print(os.environ.get('nnUNet_extTrainer'))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("None", "")


def test_pth_registers(tmp_path):
    (tmp_path / PTH.name).write_text(PTH.read_text())
    (tmp_path / "nnunet_mim").symlink_to(Path(PLUGIN_FOLDER).parent)
    program = f"import os, site; site.addsitedir({str(tmp_path)!r}); print(os.environ.get('nnUNet_extTrainer'))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "nnunet_mim" / "_nnunet_plugin"
    assert done.stderr == ""
