"""Images and DICOM series to prepare, made on the spot."""

import json
import locale
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.errors import MiMError
from nnunet_mim.preparation import prepare, prepare_case
from nnunet_mim.preparation.case_log import CaseLog
from nnunet_mim.preparation.prepare_cli import main
from nnunet_mim.system import guarded


def body(seed=0, shape=(24, 28, 32), spacing=(4.0, 3.0, 3.0)):
    """A made-up CT (z, y, x) as a SimpleITK image; spacing in mm, array order."""
    hu, _ = make_phantom(seed, shape)
    image = sitk.GetImageFromArray(np.round(hu).astype(np.int16))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin((-40.0, 12.5, 100.0))
    return image


@pytest.fixture
def ct():
    """ct(seed, shape, spacing): a made-up CT."""
    return body


def write_dicom(image, folder, uid="1.2.3.4", modality="CT", leave_out=(), **tags):
    """Write an image as a DICOM series of axial slices, stored values being HU + 1024."""
    folder.mkdir(parents=True, exist_ok=True)
    before = locale.setlocale(locale.LC_ALL)  # writing DICOM changes it, and with it the encoding of text files
    direction = image.GetDirection()
    shared = {
        "0008|0060": modality,
        "0020|000e": uid,
        "0020|000d": "1.2.3",
        "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
        "0028|1052": "-1024",
        "0028|1053": "1",
        "0020|0037": "\\".join(f"{direction[i]:g}" for i in (0, 3, 6, 1, 4, 7)),
        **tags,
    }
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(image.GetDepth()):
        if number in leave_out:
            continue
        piece = sitk.Cast(image[:, :, number], sitk.sitkInt16)
        place = image.TransformIndexToPhysicalPoint((0, 0, number))
        for key, value in {
            **shared,
            "0020|0032": "\\".join(f"{v:.6f}" for v in place),
            "0020|0013": str(number),
            "0008|0018": f"{uid}.{number}",
        }.items():
            if value is not None:
                piece.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"IM{(number * 7) % 100:03d}_{number}.dcm"))  # not in the order of the slices
        writer.Execute(piece)
    locale.setlocale(locale.LC_ALL, before)


@pytest.fixture
def dicom():
    """dicom(image, folder, uid=…, modality=…, leave_out=…, **tags)"""
    return write_dicom


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch):
    """nnU-Net's three folders, empty; returns their parent."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return Path(tmp_path)


class Preparing:
    """`mim_prepare` in folders of its own: call it with what follows -d."""

    def __init__(self, root):
        self.root = root

    def __call__(self, *arguments, spacing="4"):
        return main(["-d", *map(str, arguments), "-s", *spacing.split(), "--preset", "tiny", "-np", "1"])

    def new(self, *folders):
        """Make dataset 800, or go on with it."""
        return self(800, "-n", "Mine", "-i", *folders)

    def folder(self, dataset="Dataset800_Mine", plans="nnUNetMiMPlans"):
        """Of the preprocessed cases."""
        return self.root / "nnUNet_preprocessed" / dataset / f"{plans}_3d_fullres"

    def voxels(self, case, dataset="Dataset800_Mine", plans="nnUNetMiMPlans"):
        """(voxels, segmentation, properties) of a preprocessed case, by nnU-Net's own class."""
        folder = str(self.folder(dataset, plans))
        data, seg, _, properties = infer_dataset_class(folder)(folder, [case]).load_case(case)
        return np.asarray(data[:]), np.asarray(seg[:]), properties

    def log(self, dataset="Dataset800_Mine"):
        return CaseLog(self.folder(dataset).parent / "mim_prepare" / "nnUNetMiMPlans_3d_fullres.jsonl")

    def write_raw(self, dataset, images, labels=None):
        """A dataset in nnUNet_raw; images: channels of each case."""
        raw = self.root / "nnUNet_raw" / dataset
        (raw / "imagesTr").mkdir(parents=True)
        for i, channels in enumerate(images):
            for c, image in enumerate(channels):
                sitk.WriteImage(image, str(raw / "imagesTr" / f"case_{i}_{c:04d}.nii.gz"))
            if labels is not None:
                (raw / "labelsTr").mkdir(exist_ok=True)
                sitk.WriteImage(labels[i], str(raw / "labelsTr" / f"case_{i}.nii.gz"))
        names = {str(c): name for c, name in enumerate(("CT", "PET")[: len(images[0])])}
        content = {"channel_names": names, "labels": {"background": 0, "organ": 1}, "numTraining": len(images)}
        (raw / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
        return raw

    @staticmethod
    def organ_of(image):
        """A label: what is denser than 20 HU."""
        label = sitk.Cast(image > 20, sitk.sitkUInt8)
        label.CopyInformation(image)
        return label


@pytest.fixture
def preparing(nnunet_folders):
    return Preparing(nnunet_folders)


@pytest.fixture
def refused(capsys):
    """refused(*arguments): run the command, which must fail with one line; returns it."""

    def run(*arguments):
        assert main(list(map(str, arguments))) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: ")
        return line

    return run


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Cases are prepared in this process: faster, and monkeypatching works."""

    def run_jobs(jobs, processes):
        for job in jobs:
            item = (job, tempfile.mkdtemp(dir=tmp_path))
            outcome = guarded._outcome(prepare_case._prepare_case, item)
            if isinstance(outcome, MiMError):
                raise outcome
            yield job.case.name, prepare_case._result(outcome)

    monkeypatch.setattr(prepare, "run_jobs", run_jobs)


@pytest.fixture
def without_fingerprint(here, monkeypatch):
    """As `here`, and nnU-Net's processes that read a labelled dataset for its fingerprint are not started."""
    monkeypatch.setattr(prepare, "extracted_fingerprint", lambda *_: b"{}")


@pytest.fixture
def images(tmp_path):
    """A folder with three CT."""
    (tmp_path / "ct").mkdir()
    for i in range(3):
        sitk.WriteImage(body(i), str(tmp_path / "ct" / f"scan{i}.nii.gz"))
    return tmp_path / "ct"
