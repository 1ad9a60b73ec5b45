"""Preprocessed cases for the benchmarks, as nnU-Net leaves them."""

import json

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_mim.demo.phantoms import make_phantom
from nnunet_mim.nnunet.source import Source

WINDOW = {"percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0}
"""HU"""


def write_case(folder, name, data, seg, patch_size):
    """Write one case with nnU-Net's own chunks for a patch size."""
    data, seg = data.astype(np.float32), seg.astype(np.int16)
    blocks, chunks = comp_blosc2_params(data.shape, patch_size, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch_size, seg.itemsize)
    properties = {"class_locations": {}, "spacing": (2.0, 2.0, 2.0)}
    nnUNetDatasetBlosc2.save_case(
        data, seg, properties, str(folder / name), chunks, blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
    )


def write_phantoms(folder, count, size, patch_size=(128, 128, 128)):
    """Write made-up bodies with labels; returns their Source."""
    for number in range(count):
        hu, labels = make_phantom(number, (size,) * 3)
        write_case(folder, f"case_{number:02d}", hu[None] / 250, labels[None], patch_size)
    return source_of(folder)


def write_plans(base, cases):
    """`plans.json` of a dataset with its preprocessed cases in the folder `cases`, as far as mim_pretrain reads it."""
    configuration = {
        "data_identifier": cases,
        "batch_size": 2,
        "patch_size": [128, 128, 128],
        "median_image_size_in_voxels": [128.0, 128.0, 128.0],
        "spacing": [2.0, 2.0, 2.0],
        "normalization_schemes": ["CTNormalization"],
        "architecture": {"network_class_name": "PlainConvUNet", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    plans = {
        "dataset_name": base.name,
        "plans_name": "plans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": WINDOW},
        "configurations": {"3d_fullres": configuration},
    }
    (base / "plans.json").write_text(json.dumps(plans))


def source_of(folder):
    """The cases in a folder as a Source."""
    return Source(
        "Dataset900_Phantoms", "plans", "3d_fullres", folder, nnUNetDatasetBlosc2,
        tuple(sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))), (2.0, 2.0, 2.0), ("CTNormalization",),
        {"0": WINDOW}, {"transpose_forward": [0, 1, 2]},
    )  # fmt: skip
