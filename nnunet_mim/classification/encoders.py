"""The encoder that a classification starts from: pretrained, from the places where the trainers take it, or random."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nnunet_mim.checkpoint.format import PretrainedCheckpoint, load_checkpoint, settings_of
from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, find_checkpoint, lasting_name
from nnunet_mim.checkpoint.units import unit_differences, units_warning
from nnunet_mim.classification.options import RANDOM, ClassifyConfig
from nnunet_mim.classification.results import weights_sha256
from nnunet_mim.config import PRESETS, NetworkConfig, PretrainConfig, Size3, network_from_dict
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import suitable_strides
from nnunet_mim.networks.build import build_network
from nnunet_mim.networks.hybrid_encoder import HybridEncoder
from nnunet_mim.networks.hybrid_unet import HybridUNet, plans_architecture
from nnunet_mim.networks.resenc import ResEncMaskInMask, check_resenc, number_of_blocks
from nnunet_mim.nnunet.datasets import required_folder
from nnunet_mim.nnunet.plans import configuration_of, uses_hybrid_unet
from nnunet_mim.nnunet.source import Source
from nnunet_mim.trainers.resolve_plans import network_for
from nnunet_mim.trainers.transfer import check_channels, transfer_weights

RANDOM_WEIGHTS = "random weights"
"""origin of an encoder that was not pretrained"""


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with its weights, and where they come from."""

    module: HybridEncoder | ResEncMaskInMask
    """has `forward_features` and `token_size`"""
    origin: str
    """path of the checkpoint, or `random weights`"""
    architecture: dict[str, Any]
    """what `rebuilt_encoder` needs, plain values"""
    provenance: dict[str, Any] = field(default_factory=dict, repr=False)
    """of the checkpoint; empty: random weights"""
    notes: tuple[str, ...] = ()
    """lines for the log"""

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of its maps."""
        if isinstance(self.module, HybridEncoder):
            return tuple(self.module.config.embed_dims)
        kwargs = self.architecture["config"]["architecture"]["arch_kwargs"]
        return tuple(kwargs["features_per_stage"][1 : self.module.feature_stage + 1])

    @property
    def cell(self) -> Size3:
        """Voxels per axis that windows are multiples of: a token, or two where instance norms need several places."""
        X, Y, Z = self.module.token_size
        return (X, Y, Z) if isinstance(self.module, HybridEncoder) else (X, Y, 2 * Z)

    def copy(self) -> LoadedEncoder:
        """The same with weights of its own, to be trained."""
        return replace(self, module=deepcopy(self.module))

    @property
    def sha256(self) -> str:
        """Hash of names and weights."""
        return weights_sha256(self.module.state_dict())


def load_encoder(source: Source, config: ClassifyConfig, fold: int | str) -> LoadedEncoder:
    """The encoder of the settings, on the CPU.

    Args:
        source: dataset and plans.
        config: kind of encoder, checkpoint, seed of random weights. The control has the network of the checkpoint that
            its twin starts from, where there is one.
        fold: whose pretraining is looked for where no checkpoint is named, or `all`.

    Raises:
        MiMError: there is no checkpoint, or it does not fit.
    """
    resenc = config.encoder == "resenc"
    pretrained = _pretrained_resenc if resenc else _pretrained_hybrid
    if not config.from_random:
        return pretrained(source, _find(source, config, fold))
    twin = _twin(source, config, fold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if twin is not None:
            architecture = pretrained(source, twin).architecture
            return LoadedEncoder(rebuilt_encoder(architecture).eval(), RANDOM_WEIGHTS, architecture)
        return _random_resenc(source) if resenc else _random_hybrid(source, config.preset)


def rebuilt_encoder(architecture: Mapping[str, Any]) -> HybridEncoder | ResEncMaskInMask:
    """An encoder of the architecture that `LoadedEncoder` states, whose weights are to be loaded.

    Raises MiMError, and KeyError, TypeError or ValueError, for what is no such architecture.
    """
    if architecture["kind"] == "resenc":
        return _features_only(build_network(PretrainConfig.from_dict(architecture["config"])))
    return HybridEncoder(int(architecture["in_channels"]), network_from_dict(architecture["network"]))


def blocks_of(architecture: Mapping[str, Any]) -> int:
    """Number of blocks that an architecture asks for. Raises as `rebuilt_encoder`."""
    if architecture["kind"] == "resenc":
        block = architecture["config"]["architecture"]
        check_resenc(block)
        return number_of_blocks(block)
    return sum(network_from_dict(architecture["network"]).depths)


def with_mask_channel(encoder: LoadedEncoder) -> LoadedEncoder:
    """The encoder with one more input channel, the mask, whose weights are 0: it computes the same."""
    architecture = deepcopy(encoder.architecture)
    block = architecture["config"] if architecture["kind"] == "resenc" else architecture
    block["in_channels"] += 1
    wider, weights = rebuilt_encoder(architecture), {}
    before = encoder.module.state_dict()
    for name, value in wider.state_dict().items():
        weights[name] = before[name]
        if value.shape != before[name].shape:
            weights[name] = torch.cat([before[name], torch.zeros_like(before[name][:, :1])], dim=1)
    wider.load_state_dict(weights)
    return replace(encoder, module=wider.eval(), architecture=architecture)


def _twin(source: Source, config: ClassifyConfig, fold: int | str) -> str | None:
    """The checkpoint that --mode finetune would start from in place of --mode scratch; None without."""
    if config.mode != "scratch" or config.checkpoint == RANDOM:
        return None
    if config.checkpoint:
        return lasting_name(config.checkpoint)
    path = find_checkpoint(source.plans, source.configuration, fold, required_folder("nnUNet_results"))
    return None if path is None else str(path)


def _find(source: Source, config: ClassifyConfig, fold: int | str) -> str:
    if config.checkpoint:
        return lasting_name(config.checkpoint)
    path = find_checkpoint(source.plans, source.configuration, fold, required_folder("nnUNet_results"))
    if path is None:
        number = source.dataset[7:10]
        raise MiMError(
            f"no pretraining checkpoint for {source.dataset}, {source.plans_name}, {source.configuration}: run "
            f"mim_pretrain -d {number} -p {source.plans_name} -c {source.configuration}, or give one with -pc "
            f"CHECKPOINT or {ENV_CHECKPOINT}=CHECKPOINT; -pc none takes random weights"
        )
    return str(path)


def _hybrid(network: NetworkConfig, in_channels: int) -> dict[str, Any]:
    sizes = {name: getattr(network, name) for name in ("embed_dims", "depths", "num_heads", "mlp_ratio", "strides")}
    return {"kind": "hybrid", "in_channels": in_channels, "network": _lists(sizes)}


def _random_hybrid(source: Source, preset: str) -> LoadedEncoder:
    block = configuration_of(source.plans, source.configuration)
    if uses_hybrid_unet(block):
        kwargs = block["architecture"]["arch_kwargs"]
        names = ("embed_dims", "depths", "num_heads", "mlp_ratio")
        network = NetworkConfig(**{n: _tuples(kwargs[n]) for n in names}, strides=_tuples(kwargs["strides"][1:5]))
    else:
        network = replace(PRESETS[preset], strides=suitable_strides(source.spacing))
    module = HybridEncoder(source.in_channels, network)
    return LoadedEncoder(module.eval(), RANDOM_WEIGHTS, _hybrid(network, source.in_channels))


def _pretrained_hybrid(source: Source, path: str) -> LoadedEncoder:
    checkpoint = PretrainedCheckpoint.load(path)
    check_channels(checkpoint, source.in_channels)
    network, notes = network_for(checkpoint, source.spacing)
    block = plans_architecture(network, configuration_of(source.plans, source.configuration)["patch_size"])
    unet = HybridUNet(source.in_channels, 2, **block["arch_kwargs"])
    transfer_weights(unet, checkpoint)
    notes += _unit_notes(source, checkpoint.provenance)
    architecture = _hybrid(network, source.in_channels)
    return LoadedEncoder(unet.encoder.eval(), path, architecture, checkpoint.provenance, tuple(notes))


def _random_resenc(source: Source) -> LoadedEncoder:
    block = configuration_of(source.plans, source.configuration)
    check_resenc(block.get("architecture", {}), str(source.plans_file))
    network = replace(NetworkConfig(), strides=suitable_strides(source.spacing))
    config = PretrainConfig(
        network=network, encoder="resenc", architecture=block.get("architecture", {}), in_channels=source.in_channels,
        view_size=tuple(2 * n for n in network.token_size),  # type: ignore[arg-type]
    )  # fmt: skip
    module = _features_only(build_network(config))
    return LoadedEncoder(module.eval(), RANDOM_WEIGHTS, {"kind": "resenc", "config": config.to_dict()})


def _pretrained_resenc(source: Source, path: str) -> LoadedEncoder:
    stored = load_checkpoint(path, provenance_required=False)
    config = settings_of(stored, path)
    if config.encoder != "resenc":
        raise MiMError(f"{path} holds the hybrid encoder: leave out --encoder resenc")
    if config.in_channels != source.in_channels:
        raise MiMError(
            f"{path} was pretrained on {config.in_channels} channels, {source.dataset} has {source.in_channels}: "
            "pretrain on this dataset"
        )
    module = _features_only(build_network(config))
    module.load_state_dict({name: stored["network_weights"][name] for name in module.state_dict()})
    notes = tuple(_unit_notes(source, stored["provenance"]))
    architecture = {"kind": "resenc", "config": config.to_dict()}
    return LoadedEncoder(module.eval(), path, architecture, stored["provenance"], notes)


def _features_only(network: nn.Module) -> ResEncMaskInMask:
    """The part of the network that its features come from."""
    assert isinstance(network, ResEncMaskInMask)
    stages = network.feature_stage + 1
    network.encoder.stages = network.encoder.stages[:stages]
    network.strides = network.strides[:stages]
    network.decoder, network.projectors = nn.Identity(), nn.ModuleDict()
    return network


def _unit_notes(source: Source, provenance: dict[str, Any]) -> list[str]:
    block = configuration_of(source.plans, source.configuration)
    differences = unit_differences(
        provenance, block, source.intensity_properties, source.plans.get("transpose_forward", (0, 1, 2))
    )
    return [units_warning(differences)] if differences else []


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(v) for name, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value
