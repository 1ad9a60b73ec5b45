"""A small preprocessed nnU-Net dataset, written with nnU-Net's own classes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.pretraining import cli, loop
from nnunet_mim.pretraining.objective.views import nested_views

NETWORK = {"network_class_name": "x.PlainConvUNet", "arch_kwargs": {}, "_kw_requires_import": []}
PLANS = {
    "dataset_name": "Dataset900_Tiny",
    "plans_name": "tinyPlans",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0, "min": 0, "max": 0}
    },
    "configurations": {
        "2d": {
            "data_identifier": "tinyPlans_2d",
            "patch_size": [64, 64],
            "spacing": [3.0, 3.0],
            "architecture": NETWORK,
        },
        "3d_fullres": {
            "data_identifier": "tinyPlans_3d_fullres",
            "patch_size": [64, 64, 64],
            "batch_size": 2,
            "spacing": [3.0, 3.0, 3.0],
            "normalization_schemes": ["CTNormalization"],
            "median_image_size_in_voxels": [48.0, 48.0, 48.0],
            "architecture": NETWORK,
        },
        "other": {"inherits_from": "3d_fullres", "data_identifier": "nothing_there"},
    },
}


@pytest.fixture
def write_dataset(tmp_path, monkeypatch):
    """write(n=6, shape=…, storage='b2nd', number=900, …) → folder of the preprocessed cases; nnU-Net's variables are
    set.
    """
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))

    def write(n=6, shape=(48, 48, 48), storage="b2nd", number=900, spacing=(3.0, 3.0, 3.0), labelled=True, window=None):
        base = tmp_path / "preprocessed" / f"Dataset{number}_Tiny"
        folder = base / "tinyPlans_3d_fullres"
        folder.mkdir(parents=True)
        plans = json.loads(json.dumps(PLANS))
        plans["dataset_name"] = base.name
        plans["configurations"]["3d_fullres"]["spacing"] = list(spacing)
        if window is not None:
            plans["foreground_intensity_properties_per_channel"]["0"].update(window)
        (base / "tinyPlans.json").write_text(json.dumps(plans))
        if labelled:
            (base / "gt_segmentations").mkdir()
        for i in range(n):
            hu, labels = make_phantom(number + i, shape)
            write_case(folder, f"case_{i:02d}", hu[None] / np.float32(250), labels[None].astype(np.int8), storage)
        return folder

    return write


@pytest.fixture
def save_case():
    """save(folder, case, data (C, X, Y, Z), seg=None, storage='b2nd'): replace one preprocessed case."""
    return write_case


def write_case(folder: Path, case: str, data, seg=None, storage="b2nd"):
    """Write one case as nnU-Net's preprocessing does."""
    data = np.asarray(data, dtype=np.float32)
    seg = np.zeros(data.shape, dtype=np.int8) if seg is None else seg
    for old in folder.glob(f"{case}*"):
        old.unlink()
    properties = {"class_locations": {}, "spacing": (3.0, 3.0, 3.0)}
    if storage == "b2nd":
        chunks = (1, *(min(32, n) for n in data.shape[1:]))
        nnUNetDatasetBlosc2.save_case(data, seg, properties, str(folder / case), chunks, chunks)
    else:
        nnUNetDatasetNumpy.save_case(data, seg, properties, str(folder / case))


SMALL = ("-d", "900", "-p", "tinyPlans", "--preset", "tiny", "--view", "32", "--scale", "2", "2", "2", "-device", "cpu",
         "--children", "2", "1")  # fmt: skip
"""a run of a few seconds on the dataset of `write_dataset`"""


@pytest.fixture
def small_runs(tmp_path):
    """Small runs of mim_pretrain: `here` (in this process), `start` (as a process of its own), and what they leave."""

    def here(*args, batch="1", workers="0"):
        return cli.main([*SMALL, "--batch", batch, "--workers", workers, *args])

    def start(*args, batch="1", workers="0", launcher=(), **env):
        command = [sys.executable, *launcher, "-m", "nnunet_mim.pretraining.cli", *SMALL, "--batch", batch]
        return subprocess.Popen(
            [*command, "--workers", workers, *args], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env}, cwd=tmp_path,
        )  # fmt: skip

    def folder(tag, fold="all"):
        return tmp_path / "results" / "Dataset900_Tiny" / f"MiMPretrain_{tag}__tinyPlans__3d_fullres" / f"fold_{fold}"

    def rows(tag, part="train"):
        with (folder(tag) / f"{part}.csv").open() as file:
            return [{k: v for k, v in row.items() if k != "crops_per_s"} for row in csv.DictReader(file)]

    return SimpleNamespace(here=here, start=start, folder=folder, rows=rows)


@pytest.fixture
def interrupted_run(monkeypatch):
    """interrupted_run(*args, after=n): a small run that ends abruptly while iteration n+1 begins."""

    def start(*args, after):
        iterations = []

        def stop_later(*views_args):
            iterations.append(1)
            if len(iterations) > after:
                raise ZeroDivisionError
            return nested_views(*views_args)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "nested_views", stop_later)
            with pytest.raises(ZeroDivisionError):
                cli.main([*SMALL, "--batch", "1", "--workers", "0", *args])

    return start
