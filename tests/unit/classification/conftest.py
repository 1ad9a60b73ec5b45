"""A dataset of made-up cases in nnU-Net's folders: a ball of tissue in each, brighter where it is a lesion."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_mim.nnunet.source import find_source

DATASET = "Dataset007_Toy"
N_CASES = 36
DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "ball": 1},
    "numTraining": N_CASES,
    "file_ending": ".nii.gz",
}


def make_case(number):
    """(HU, ball, whether it is a lesion) of shape (Z, Y, X); a margin of zeros around it, which nnU-Net crops."""
    rng = np.random.default_rng(number)
    lesion = number % 2 == 0
    shape = rng.integers(12, 26, size=3) + (0, 8, 8)
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    centre = shape / 2 + rng.uniform(-2, 2, size=3)
    radius = rng.uniform(3, 4.5)
    ball = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < radius**2
    hu = rng.normal(-800, 40, size=shape)
    hu[ball] = rng.normal(120 if lesion else -100, 60, size=int(ball.sum()))
    return np.pad(hu, 2).round(), np.pad(ball, 2), lesion


def write_image(array, path, spacing=(1.5, 1.5, 2.5)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="session")
def raw_folder(tmp_path_factory):
    """nnUNet_raw with the dataset and its labels.csv, two cases a patient; not to be written to."""
    raw = tmp_path_factory.mktemp("raw")
    base = raw / DATASET
    for part in ("imagesTr", "labelsTr"):
        (base / part).mkdir(parents=True)
    rows = []
    for number in range(N_CASES):
        hu, ball, lesion = make_case(number)
        name = f"case_{number:02d}"
        write_image(hu.astype(np.int16), base / "imagesTr" / f"{name}_0000.nii.gz")
        write_image(ball.astype(np.uint8), base / "labelsTr" / f"{name}.nii.gz")
        rows.append([name, f"patient_{number // 4}", int(lesion), "abc"[number % 3], float(ball.sum())])
    with (base / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["case", "patient", "lesion", "kind", "voxels"], *rows])
    (base / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return raw


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Holds the preprocessed dataset once it has been made."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("prepared"), done=False)


@pytest.fixture
def toy_plans(plans):
    """Plans of the toy dataset with a network of a few weights and anisotropic tokens."""
    kwargs = {
        "embed_dims": [6, 6, 12, 12], "depths": [1, 1, 1, 1], "num_heads": 2, "mlp_ratio": 2.0,
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 1, 1]], "stem_features": 4,
    }  # fmt: skip
    name = "nnunet_mim.networks.hybrid_unet.HybridUNet"
    architecture = {"network_class_name": name, "arch_kwargs": kwargs, "_kw_requires_import": []}
    plans["configurations"]["3d_fullres"]["architecture"] = architecture
    return plans


@pytest.fixture
def folders(tmp_path, monkeypatch, raw_folder, prepared, toy_plans):
    """nnU-Net's folders with the dataset, preprocessed by nnU-Net; `base` is that in nnUNet_preprocessed."""
    if not prepared.done:
        manager = PlansManager(toy_plans)
        configuration = manager.get_configuration("3d_fullres")
        cases = prepared.folder / DATASET / "nnUNetPlans_3d_fullres"
        cases.mkdir(parents=True)
        for image in sorted((raw_folder / DATASET / "imagesTr").iterdir()):
            name = image.name.removesuffix("_0000.nii.gz")
            label = raw_folder / DATASET / "labelsTr" / f"{name}.nii.gz"
            DefaultPreprocessor(verbose=False).run_case_save(
                str(cases / name), [str(image)], str(label), manager, configuration, DATASET_JSON
            )
        prepared.done = True
    preprocessed, results = tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results"
    shutil.copytree(prepared.folder, preprocessed)
    results.mkdir()
    base = preprocessed / DATASET
    (base / "nnUNetPlans.json").write_text(json.dumps(toy_plans))
    (base / "dataset.json").write_text(json.dumps(DATASET_JSON))
    for name, folder in (("raw", raw_folder), ("preprocessed", preprocessed), ("results", results)):
        monkeypatch.setenv(f"nnUNet_{name}", str(folder))
    monkeypatch.delenv("nnUNet_mim_checkpoint", raising=False)
    return SimpleNamespace(raw=raw_folder / DATASET, base=base, results=results / DATASET)


@pytest.fixture
def source(folders):
    """The dataset as a Source."""
    return find_source("7", "nnUNetPlans", "3d_fullres")
