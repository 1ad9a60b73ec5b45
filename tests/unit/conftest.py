"""Hand-made pretraining checkpoints and stock plans of a toy dataset."""

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings

from nnunet_mim.config import NetworkConfig, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.networks.mask_in_mask import MaskInMask
from nnunet_mim.preparation import cli as plan_cli
from nnunet_mim.preparation import prepare_cli
from nnunet_mim.pretraining import cli as pretrain_cli

ROOT = Path(__file__).parents[2]
SCRIPTS = dict(re.findall(r'^(mim_\w+) = "([\w.:]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
DATASET = "Dataset007_Toy"
DECODER = {"decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
NETWORK = NetworkConfig((6, 6, 12, 12), (1, 1, 1, 2), num_heads=2, **DECODER)


@pytest.fixture(scope="session")
def junk():
    """Documents with junk in them.

    `places(content)` are the paths of all values below the top of nested dicts and lists; `put(content, path, value)`
    is a copy with another value there, or without one where it is `...`; `at(content, share)` the path that far down.
    `taken(read, path)` is what a function reads from a file, or None where it refuses it in one line that names it;
    neither takes five seconds.
    """

    def places(value, path=()):
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            yield (*path, key)
            yield from places(child, (*path, key))

    def put(content, path, value):
        top = {"top": deepcopy(content)}
        *way, last = ("top", *path)
        holder = top
        for key in way:
            holder = holder[key]
        if value is ...:
            del holder[last]
        else:
            holder[last] = deepcopy(value)
        return top.get("top")

    def at(content, share):
        found = list(places(content))
        return found[int(share * len(found))]

    def taken(read, path):
        began = time.monotonic()
        try:
            found, said = read(path), str(path)
        except MiMError as error:
            found, said = None, str(error)
        assert time.monotonic() - began < 5
        assert str(path) in said
        assert said.isprintable()
        return found

    return SimpleNamespace(places=places, put=put, at=at, taken=taken)


@pytest.fixture(params=["few", pytest.param("many", marks=pytest.mark.long)])
def examples(request):
    """examples(few, many): decorates a property that hypothesis tries, as often as this says; many with -m long."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    number = ("few", "many").index(request.param)
    return lambda *counts: settings(max_examples=counts[number], suppress_health_check=quiet)


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


RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def residual_encoder():
    """A small residual encoder U-Net, as a block of nnU-Net's plans."""
    kwargs = {
        "n_stages": 4, "features_per_stage": [2, 3, 4, 4], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 4, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
        "n_blocks_per_stage": [1] * 4, "n_conv_per_stage_decoder": [1] * 3, "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return {"network_class_name": RESENC, "arch_kwargs": kwargs, "_kw_requires_import": imported}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Blocks of plans that run a command where nnU-Net builds the network that they name.

    `clean` is a sound block, poisoned(place) one that is not, `file` what the command makes; `trap` makes it when it is
    unpickled.
    """
    file = tmp_path / "canary"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mim_canary.py").write_text(f"open({str(file)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "mim_canary", raising=False)

    def poisoned(place):
        block = residual_encoder()
        kwargs = block["arch_kwargs"]
        if place == "network_class_name":
            block[place] = "mim_canary.ResidualEncoderUNet"
        elif place in ("conv_op", "norm_op"):  # called with a number of channels first, which a command is not
            kwargs[place] = "mim_canary.Layer"
        elif place == "_kw_requires_import":
            kwargs["block"] = "mim_canary.Block"
            block[place] = [*block[place], "block"]
        else:
            command = {"args": f"touch {file}", "shell": True}
            kwargs |= {place: "subprocess.check_output", f"{place}_kwargs": command}
        return block

    return SimpleNamespace(clean=residual_encoder(), poisoned=poisoned, file=file, trap=_Trap(file))


class _Trap:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


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
