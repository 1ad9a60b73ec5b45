"""Fresh virtual environments that see the dependencies of the running one, but not its nnunet_mim."""

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".git", ".venv*", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")


@dataclass(frozen=True)
class Environment:
    """A virtual environment in `folder`."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(self, *arguments: str | Path, **variables: str) -> str:
        """Run this environment's Python with `arguments` outside the project; returns what it printed."""
        return run(self.python, *arguments, cwd=self.folder, **variables)

    def pip(self, *arguments: str | Path) -> str:
        return self.run("-m", "pip", *arguments, PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1")

    def install(self, *arguments: str | Path) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", *arguments)

    def variable(self, **variables: str) -> str:
        """nnUNet_extTrainer as a Python of this environment sees it, None if it is not set."""
        return self.run("-c", "import os; print(os.environ.get('nnUNet_extTrainer'))", **variables).strip()

    def files(self) -> set[str]:
        """Everything in site-packages and bin but bytecode."""
        paths = [path for folder in (self.site_packages, self.folder / "bin") for path in folder.rglob("*")]
        return {path.relative_to(self.folder).as_posix() for path in paths if "__pycache__" not in path.parts}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run `command` with a clean environment plus `variables`; returns stdout, fails with all output."""
    # the running environment's own nnunet_mim has set nnUNet_extTrainer; the children must not inherit it
    dropped = {"nnUNet_extTrainer", "NNUNET_MIM_NO_AUTOREGISTER", "PYTHONPATH", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def belongs_to_nnunet_mim(entry: Path) -> bool:
    return entry.name.startswith(("nnunet_mim", "__editable__.nnunet_mim", "__editable___nnunet_mim"))


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory) -> Path:
    """A folder of links to everything installed for the running Python, except nnunet_mim."""
    folder = tmp_path_factory.mktemp("dependencies")
    installed = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    for entry in (entry for site in installed if site.is_dir() for entry in site.iterdir()):
        link = folder / entry.name
        if not (belongs_to_nnunet_mim(entry) or entry.name == "__pycache__" or link.exists()):
            link.symlink_to(entry)
    return folder


@pytest.fixture
def environment(tmp_path, dependencies) -> Environment:
    """A new virtual environment without nnunet_mim; pip, setuptools and the rest come from `dependencies`."""
    new = Environment(tmp_path / "venv")
    venv.create(new.folder, with_pip=False, symlinks=True)
    # addsitedir and not just the path: dependencies may be editable installs, which live in .pth files
    (new.site_packages / "dependencies.pth").write_text(f"import site; site.addsitedir({str(dependencies)!r})\n")
    assert new.variable() == "None"
    return new


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project to build in."""
    return Path(shutil.copytree(PROJECT, tmp_path / "project", ignore=NOT_SOURCE))
