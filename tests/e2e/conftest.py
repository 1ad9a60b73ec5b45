"""Running the real commands in nnU-Net folders of their own, on real CT where there is any."""

import json
import locale
import os
import subprocess
import sys
import zlib
from contextlib import redirect_stderr
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import SimpleITK as sitk

REPOSITORY = Path(__file__).parents[2]
DATA = Path(os.environ.get("MIM_TEST_DATA") or REPOSITORY.parent / "shared" / "data")

PLANNED: dict[tuple[int, ...], dict[str, str]] = {}
"""files that nnU-Net's planning has written, by the images"""


class Workplace:
    """nnU-Net's three folders, and commands run in them."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / name).mkdir()
        self.env = {
            **{k: v for k, v in os.environ.items() if k != "nnUNet_mim_checkpoint"},
            **{name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
        }

    def command(self, name, *arguments):
        return [str(Path(sys.executable).with_name(name)), *map(str, arguments)]

    def __call__(self, name, *arguments, fails=False, **env):
        """Run a command. Returns what it printed (its errors, where it has to fail)."""
        done = subprocess.run(
            self.command(name, *arguments),
            env={**self.env, **env},
            capture_output=True,
            encoding="utf-8",
            cwd=self.folder,
        )
        assert (done.returncode != 0) == fails, f"{name} {arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stderr if fails else done.stdout

    def refused(self, name, *arguments, **env):
        """What a command of this package that has to fail says, run in this process: to start one takes seconds."""
        (entry,) = entry_points(group="console_scripts", name=name)
        with patch.dict(os.environ, {**self.env, **env}), redirect_stderr(StringIO()) as said:
            try:
                code = entry.load()(list(map(str, arguments)))
            except SystemExit as end:  # argparse's own errors
                code = end.code
        assert code == 2, f"{name} {arguments}: {code}"
        return said.getvalue()

    def plan(self, number):
        """nnU-Net's fingerprint and plans of a dataset; nothing is preprocessed. Equal images are planned once."""
        (raw,) = (self.folder / "nnUNet_raw").glob(f"Dataset{number}_*")
        images = tuple(zlib.crc32(path.read_bytes()) for path in sorted(raw.rglob("*")) if path.is_file())
        folder = self.folder / "nnUNet_preprocessed" / raw.name
        if images not in PLANNED:
            options = ("-c", "3d_fullres", "-npfp", "1", "-np", "1", "--no_pp")
            self("nnUNetv2_plan_and_preprocess", "-d", number, *options, nnUNet_n_proc_DA="1")  # 0 breaks the planner
            PLANNED[images] = {path.name: path.read_text().replace(raw.name, "DATASET") for path in folder.iterdir()}
        folder.mkdir(exist_ok=True)
        for name, text in PLANNED[images].items():
            (folder / name).write_text(text.replace("DATASET", raw.name))

    def write_dataset(self, dataset, n_cases, side):
        """Write `n_cases` training images of side³ voxels around an organ, one label, and one more image in `new`."""
        raw = self.folder / "nnUNet_raw" / dataset
        for path in (raw / "imagesTr", raw / "labelsTr", self.folder / "new"):
            path.mkdir(parents=True, exist_ok=True)
        for i in range(n_cases + 1):
            image, label = real_case(i, side) or made_up_case(i, side)
            if i == n_cases:
                sitk.WriteImage(image, self.folder / "new" / "new_1_0000.nii.gz")
            else:
                sitk.WriteImage(image, raw / "imagesTr" / f"case_{i}_0000.nii.gz")
                sitk.WriteImage(label, raw / "labelsTr" / f"case_{i}.nii.gz")
        labels = {"background": 0, "organ": 1}
        content = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": n_cases, "file_ending": ".nii.gz"}
        (raw / "dataset.json").write_text(json.dumps(content))


def real_case(index, side):
    """A crop of a real CT around its organs and its label, or None where there is no test data."""
    folder = DATA / "nnUNet_raw" / "Dataset501_HeadNeckOAR"
    files = sorted((folder / "imagesTr").glob("*.nii.gz"))
    if len(files) <= index:
        assert os.environ.get("CI") != "true", f"{folder} is missing: set MIM_TEST_DATA to the folder of test CTs"
        return None
    image = sitk.ReadImage(files[index])
    label = sitk.ReadImage(folder / "labelsTr" / files[index].name.replace("_0000", ""))
    centre = np.argwhere(sitk.GetArrayFromImage(label) > 0).mean(0)[::-1]
    start = [int(np.clip(c - side // 2, 0, n - side)) for c, n in zip(centre, image.GetSize(), strict=True)]
    image, label = (sitk.RegionOfInterest(x, [side] * 3, start) for x in (image, label))
    return image, sitk.Cast(label > 0, sitk.sitkUInt8)


def made_up_case(index, side):
    """Noise with a denser ball; (image, label)."""
    rng = np.random.default_rng(index)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    ball = ((grid - rng.integers(3 * side // 8, 5 * side // 8, (3, 1, 1, 1))) ** 2).sum(0) < (side // 4) ** 2
    voxels = rng.normal(40, 60, (side,) * 3) + 300 * ball
    return sitk.GetImageFromArray(voxels.astype(np.int16)), sitk.GetImageFromArray(ball.astype(np.uint8))


@pytest.fixture(scope="module")
def workplace_of(tmp_path_factory):
    """workplace_of(name) → a Workplace in a new folder."""
    return lambda name: Workplace(tmp_path_factory.mktemp(name))


def dicom_series(image, folder):
    """A DICOM series of a volume as a scanner writes it: one file a slice, stored values and a rescale."""
    folder.mkdir(parents=True)
    before = locale.setlocale(locale.LC_ALL)  # writing DICOM changes it
    direction = image.GetDirection()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    uid = f"1.2.826.0.1.{zlib.crc32(folder.name.encode())}"
    for number in range(image.GetDepth()):
        piece = image[:, :, number]
        tags = {
            "0008|0060": "CT", "0020|000e": uid, "0020|000d": "1.2.826.0.1.1", "0008|0018": f"{uid}.{number}",
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL", "0028|1052": "-1024", "0028|1053": "1",
            "0020|0037": "\\".join(f"{direction[i]:.9g}" for i in (0, 3, 6, 1, 4, 7)),
            "0020|0032": "\\".join(f"{v:.9g}" for v in image.TransformIndexToPhysicalPoint((0, 0, number))),
        }  # fmt: skip
        for key, value in tags.items():
            piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{number:05d}.dcm"))
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture(scope="session")
def write_series():
    """write_series(image, folder): a DICOM series of a volume as a scanner writes it."""
    return dicom_series
