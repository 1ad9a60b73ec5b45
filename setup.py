"""The two build commands that ship `nnunet_mim.pth`; everything else is in pyproject.toml.

The .pth file must lie at the top of site-packages, and setuptools has no setting for that which editable installs
respect (they drop `data_files`).
"""

import base64
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = Path("packaging", "nnunet_mim.pth")


class BuildPyWithPth(build_py):
    """Regular wheels: the file is copied to the top of the build folder."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copyfile(PTH, os.path.join(self.build_lib, PTH.name))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, os.path.join(self.build_lib, PTH.name)]


class EditableWheelWithPth(editable_wheel):
    """Editable installs: the file is added to the finished wheel."""

    def run(self) -> None:
        super().run()
        wheel = max(Path(self.dist_dir).glob("*.whl"), key=lambda path: path.stat().st_mtime)
        add_to_wheel(wheel, PTH)


def add_to_wheel(wheel: Path, file: Path) -> None:
    """Rewrite `wheel` with `file` at its top level, listed in RECORD so that uninstalling removes it."""
    data = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    rewritten = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(rewritten, "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr(file.name, data)
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content += f"{file.name},sha256={digest},{len(data)}\n".encode()
            new.writestr(entry, content)
    os.replace(rewritten, wheel)


setup(cmdclass={"build_py": BuildPyWithPth, "editable_wheel": EditableWheelWithPth})
