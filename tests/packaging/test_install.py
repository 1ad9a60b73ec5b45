"""Build, install, discovery by nnU-Net and uninstall, for every way of installing."""

import base64
import csv
import hashlib
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

import nnunet_mim

VERSION = nnunet_mim.__version__
DIST_INFO = f"nnunet_mim-{VERSION}.dist-info"
COMMANDS = {
    "mim_benchmark", "mim_classify", "mim_convert", "mim_demo", "mim_export", "mim_inspect", "mim_plan", "mim_prepare",
    "mim_pretrain",
}  # fmt: skip

# A spawned process looks the trainer up and sends the class back through a pickle: one lookup (8-16 s) shows that
# spawned processes find it, that it can be pickled, and that it is the one that can be imported.
LOOK_UP = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(recursive_find_trainer_class_by_name, "nnUNetTrainerMiM").result()
    import nnunet_mim.trainers
    assert found is nnunet_mim.trainers.nnUNetTrainerMiM, found
    print("installed in", nnunet_mim.__file__)
"""
LOOK_UP_BOTH = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
import nnunet_mim.trainers

for name in ("nnUNetTrainerOfTheUser", "nnUNetTrainerMiM", "nnUNetTrainerMiMScratch"):
    found = recursive_find_trainer_class_by_name(name)
    assert found.__name__ == name, found
    assert getattr(nnunet_mim.trainers, name, found) is found, found
"""
BUILD_EDITABLE = "from setuptools.build_meta import build_editable; build_editable('..')"  # the hook that pip calls
USERS_TRAINER = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerOfTheUser(nnUNetTrainer):
    pass
"""


def build(environment, project: Path, kind: str, target: Path) -> Path:
    """Build `kind` (wheel or sdist) of the project with the tools at hand; returns the file."""
    environment.run("-m", "build", "--no-isolation", f"--{kind}", "--outdir", target, project)
    (built,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def sources(project: Path) -> set[str]:
    return {path.relative_to(project).as_posix() for path in (project / "nnunet_mim").rglob("*") if path.is_file()}


def check_record(wheel: Path) -> set[str]:
    """Every file is listed in RECORD with its hash, so that any installer takes and removes it; returns the names."""
    with zipfile.ZipFile(wheel) as archive:
        record = {name: digest for name, digest, _ in csv.reader(archive.read(f"{DIST_INFO}/RECORD").decode().split())}
        for name in archive.namelist():
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
            assert record[name] in {f"sha256={digest}", "" if name.endswith("/RECORD") else None}, name
    return set(record)


def check_wheel(wheel: Path, project: Path) -> None:
    """The wheel holds the whole package and the .pth, and claims no other name."""
    names = check_record(wheel)
    assert {name.split("/")[0] for name in names} == {"nnunet_mim", "nnunet_mim.pth", DIST_INFO}
    assert {name for name in names if name.startswith("nnunet_mim/")} == sources(project)


def check_discovery(environment, expected_package: Path, tmp_path: Path) -> None:
    script = tmp_path / "look_up.py"
    script.write_text(LOOK_UP)
    printed = environment.run(script)
    assert f"installed in {expected_package / '__init__.py'}" in printed.splitlines()


def check_variable(environment, plugin: Path) -> None:
    """Set without help, added to what the user has, not repeated, and off when asked."""
    assert environment.variable() == str(plugin)
    assert environment.variable(nnUNet_extTrainer="mine") == os.pathsep.join(["mine", str(plugin)])
    assert environment.variable(nnUNet_extTrainer=str(plugin)) == str(plugin)
    assert environment.variable(NNUNET_MIM_NO_AUTOREGISTER="1") == "None"


def check_uninstall(environment, before: set[str]) -> None:
    environment.pip("uninstall", "-y", "nnunet_mim")
    assert environment.files() == before
    assert environment.variable() == "None"
    assert environment.run("-c", "import importlib.util as u; print(u.find_spec('nnunet_mim'))").strip() == "None"


@pytest.mark.slow
def test_wheel(environment, project, tmp_path):
    before = environment.files()
    wheel = build(environment, project, "wheel", tmp_path / "dist")
    check_wheel(wheel, project)

    environment.install(wheel)
    added = {name.removeprefix("lib/") for name in environment.files() - before}
    top = {Path(name).parts[2] for name in added if "site-packages" in name}
    assert top == {"nnunet_mim", "nnunet_mim.pth", DIST_INFO}
    assert {Path(name).name for name in added if name.startswith("bin/")} == COMMANDS
    package = environment.site_packages / "nnunet_mim"
    check_variable(environment, package / "_nnunet_plugin")
    check_discovery(environment, package, tmp_path)

    environment.install("--force-reinstall", wheel)
    check_variable(environment, package / "_nnunet_plugin")
    check_uninstall(environment, before)


@pytest.mark.slow
def test_editable(environment, project, tmp_path):
    before = environment.files()
    environment.run("-c", f"import os; os.chdir({str(project)!r}); {BUILD_EDITABLE}")
    (wheel,) = project.parent.glob("*.whl")
    assert "nnunet_mim.pth" in check_record(wheel)

    environment.install("-e", project)
    added = environment.files() - before
    top = {Path(name).name for name in added if Path(name).parent.name == "site-packages"}
    assert {"nnunet_mim.pth", DIST_INFO} < top
    assert {name for name in top if not name.startswith("__editable__")} == {"nnunet_mim.pth", DIST_INFO}

    package = project / "nnunet_mim"
    check_variable(environment, package / "_nnunet_plugin")
    check_discovery(environment, package, tmp_path)
    check_uninstall(environment, before)


def test_sdist_to_wheel(environment, project, tmp_path):
    before = environment.files()
    sdist = build(environment, project, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CITATION.cff", "CHANGELOG.md", "packaging/nnunet_mim.pth", "setup.py"} <= names
    assert {path.name for path in (project / "tests" / "packaging").glob("*.py")} == {
        Path(name).name for name in names if name.startswith("tests/packaging/")
    }

    environment.pip("wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", sdist)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    check_wheel(wheel, project)
    environment.install(wheel)
    check_variable(environment, environment.site_packages / "nnunet_mim" / "_nnunet_plugin")
    check_uninstall(environment, before)


@pytest.mark.slow
def test_a_users_trainer_and_ours_are_both_found(environment, project, tmp_path):
    environment.install(project)
    users = tmp_path / "users_trainers"
    users.mkdir()
    (users / "my_trainer.py").write_text(USERS_TRAINER)
    environment.run("-c", LOOK_UP_BOTH, nnUNet_extTrainer=str(users))


def test_start_up_is_cheap_and_survives_a_deleted_package(environment, project):
    environment.install(project)
    program = "import sys; print([name for name in ('torch', 'numpy', 'nnunetv2') if name in sys.modules])"
    assert environment.run("-c", program).strip() == "[]"

    # what the line in the .pth costs, package import included; the best of five, as the machine may be busy
    line = (environment.site_packages / "nnunet_mim.pth").read_text()
    timed = (
        "import sys, time\n"
        "for name in [name for name in sys.modules if name.startswith('nnunet_mim')]: del sys.modules[name]\n"
        f"start = time.perf_counter(); exec({line!r}); print(time.perf_counter() - start)"
    )
    assert min(float(environment.run("-c", timed)) for _ in range(5)) < 0.003

    (environment.site_packages / "nnunet_mim").rename(environment.folder / "elsewhere")
    assert environment.run("-c", "import sys; print(sys.stderr.name)") == "<stderr>\n"
    assert environment.variable() == "None"
