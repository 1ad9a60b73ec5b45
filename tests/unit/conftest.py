"""Hand-made pretraining checkpoints and stock plans of a toy dataset."""

import argparse
import importlib
import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.preparation import cli as plan_cli
from nnunet_mim.preparation import prepare_cli
from nnunet_mim.pretraining import cli as pretrain_cli

ROOT = Path(__file__).parents[2]
SCRIPTS = dict(re.findall(r'^(mim_\w+) = "([\w.:]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
DATASET = "Dataset007_Toy"
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2, **DECODER)


@pytest.fixture
def network_config():
    return NETWORK


@pytest.fixture
def make_checkpoint(tmp_path):
    """Writes a checkpoint as `mim_pretrain` does and returns (path, its encoder)."""

    def make(path=None, network=NETWORK, in_channels=1, seed=3, cases=(), **changes):
        torch.manual_seed(seed)
        network = replace(network, **DECODER)
        model = MaskInMask(network, in_channels)
        config = PretrainConfig(preset="tiny", network=network, in_channels=in_channels, view_size=(32, 32, 32))
        stored = {
            "network_weights": dict(model.state_dict()),
            "mim_config": config.to_dict(),
            "mim_version": "0.0.0",
            "provenance": {
                "datasets": [DATASET],
                "spacing": [2.0, 2.0, 2.0],
                "normalization": ["CTNormalization"] * in_channels,
                "intensity_properties": {str(c): dict(WINDOW) for c in range(in_channels)},
                "iterations": 10,
                "cases": list(cases),
            },
            **changes,
        }
        path = path or tmp_path / "pretrained.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(stored, path)
        return path, model.encoder

    return make


WINDOW = {
    "percentile_00_5": -1000.0, "percentile_99_5": 1000.0, "mean": 0.0, "std": 250.0,
    "min": -1000.0, "max": 1000.0, "median": 0.0,
}  # fmt: skip


@pytest.fixture
def plans():
    """Stock plans of a toy dataset, as nnU-Net's planner writes them (transposed: axis 0 was the second axis)."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [32, 32, 32],
        "median_image_size_in_voxels": [40.0, 36.0, 34.0],
        "spacing": [2.0, 2.0, 2.0],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]},
            "_kw_requires_import": [],
        },
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [2.0, 2.0, 2.0],
        "original_median_shape_after_transp": [40, 36, 34],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": dict(WINDOW)},
        "configurations": {"2d": {**configuration, "patch_size": [32, 32]}, "3d_fullres": configuration},
        "mim_finetune": {"num_epochs": 2, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1},
    }


@pytest.fixture
def parsed_commands():
    """parsed_commands(text): what the parsers of this package's commands make of the commands in a message."""
    parsers = {
        "mim_prepare": prepare_cli._parser,
        "mim_plan": plan_cli._parser,
        "mim_pretrain": pretrain_cli._build_parser,
    }

    def parse(text):
        commands = re.findall(r"\b(mim_(?:prepare|plan|pretrain) -[^`,;()…]+)", text)
        return [parsers[command.split()[0]]().parse_args(command.split()[1:]) for command in commands]

    return parse


class ParserFoundError(Exception):
    """Carries the parser of a command out of it."""


@pytest.fixture(scope="session")
def parser_of():
    """parser_of(name): the argparse parser of one of our commands or nnU-Net's; None for a name that is no command."""
    theirs = importlib.metadata.distribution("nnunetv2").entry_points
    entries = {**{e.name: e.value for e in theirs}, **SCRIPTS}
    found = {}

    def capture(self, *_, **__):
        raise ParserFoundError(self)

    def find(name):
        if name not in found and name in entries:
            module, function = entries[name].split(":")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
                with pytest.raises(ParserFoundError) as error:
                    getattr(importlib.import_module(module), function)()
            found[name] = error.value.args[0]
        return found.get(name)

    find.scripts = SCRIPTS
    return find
