"""From settings to a PretrainConfig: what the user sets, what the preset decides, and what suits the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nnunet_mim.config import (
    DEFAULT_LEARNING_RATE,
    PRESETS,
    NetworkConfig,
    PretrainConfig,
    Size3,
    network_from_dict,
    without_retired,
)
from nnunet_mim.errors import MiMError, printable
from nnunet_mim.geometry import suitable_scale, suitable_strides, suitable_view
from nnunet_mim.networks.resenc import check_resenc, check_view, fitting_view
from nnunet_mim.nnunet.documents import check_architecture
from nnunet_mim.nnunet.plans import configuration_of, is_mim_prepared, mim_prepare_command, uses_hybrid_unet
from nnunet_mim.nnunet.source import Source
from nnunet_mim.settings import check_value, settings_table
from nnunet_mim.system.files import write_atomically

ENCODER_SIZES = ("embed_dims", "depths", "num_heads", "mlp_ratio")
"""what plans say of an encoder, and a finetuning cannot change"""


def merge_settings(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Later parts override earlier ones. `network.depths` and `network: {depths: …}` mean the same.

    Raises:
        MiMError: a name that PretrainConfig does not have, or a value of another kind than its default.
    """
    merged: dict[str, Any] = {"network": {}}
    for part in parts:
        for name, value in without_retired(part).items():
            if name == "network":
                if not isinstance(value, Mapping):
                    raise MiMError(f"setting 'network' must hold sizes like network.depths, got {value!r}")
                merged["network"] |= value
            elif name.startswith("network."):
                merged["network"][name.removeprefix("network.")] = value
            else:
                merged[name] = value
    _check(merged, PretrainConfig(), "")
    _check(merged["network"], NetworkConfig(), "network.")
    return merged


def _check(settings: Mapping[str, Any], default: Any, prefix: str) -> None:
    defaults = {entry.name: getattr(default, entry.name) for entry in fields(default)}
    for name, value in settings.items():
        if name not in defaults:
            raise MiMError(
                f"unknown setting '{prefix}{printable(name)}': mim_pretrain --list_settings shows all of them"
            )
        one_for_all_axes = name == "view_size" and isinstance(value, int)
        if name != "network" and not one_for_all_axes:
            check_value(f"{prefix}{name}", value, defaults[name])


def _with_residual_encoder(settings: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """Raises MiMError where the plans name another network, or the view is not what it can halve."""
    architecture = settings.get("architecture")
    if architecture:
        remedy = "leave it out, and the network is that of the plans"
        check_architecture("setting 'architecture'", architecture, remedy)
    else:
        architecture = configuration_of(source.plans, source.configuration).get("architecture", {})
    check_resenc(architecture, "setting 'architecture'" if settings.get("architecture") else str(source.plans_file))
    if "view_size" in settings:
        check_view(architecture, _triple(settings["view_size"]))
    return {**settings, "architecture": architecture}


def with_network_of_plans(settings: Mapping[str, Any], sources: Sequence[Source], resume: bool) -> dict[str, Any]:
    """Settings, and what the plans say of the network that is pretrained.

    With `encoder: resenc` that is their architecture. With plans of mim_plan or mim_prepare it is the preset and the
    sizes of their encoder: a finetuning with them takes no other.

    Args:
        settings: of `merge_settings`.
        sources: the datasets; the first one's architecture is taken, and no plans may name another encoder.
        resume: a run that is continued keeps its hybrid encoder.

    Raises:
        MiMError: the settings name another encoder than the plans, or the plans one that cannot be pretrained.
    """
    if settings.get("encoder") == "resenc":
        return _with_residual_encoder(settings, sources[0])
    for source in sources if not resume else ():
        settings = _with_hybrid_encoder(settings, source)
    return dict(settings)


def _with_hybrid_encoder(settings: Mapping[str, Any], source: Source) -> dict[str, Any]:
    config = configuration_of(source.plans, source.configuration)
    if settings.get("encoder", PretrainConfig.encoder) != "hybrid" or not uses_hybrid_unet(config):
        return dict(settings)
    kwargs = config["architecture"]["arch_kwargs"]
    sizes = {name: kwargs[name] for name in ENCODER_SIZES}
    planned = network_from_dict({**asdict(PRESETS[PretrainConfig.preset]), **sizes})
    planned_preset = _preset_of(planned)
    if "preset" not in settings:
        preset = planned_preset or PretrainConfig.preset
        settings = {**settings, "preset": preset, "network": {**sizes, **settings.get("network", {})}}
    found = _network_of(settings)
    known_as = f"preset {planned_preset}" if planned_preset else "no preset"
    for name in ENCODER_SIZES:
        wanted, given = getattr(planned, name), getattr(found, name)
        if given != wanted:
            change = f", or change the plans first with {_plan_command(source, settings['preset'])}"
            raise MiMError(
                f"plans {source.plans_name} of {source.dataset} name an encoder with {name} {wanted} ({known_as}), and "
                f"cannot finetune one with {given}: leave out --preset and network settings"
                + (change if settings["preset"] == _preset_of(found) else "")
            )
    return dict(settings)


def _preset_of(network: NetworkConfig) -> str | None:
    """The preset with an encoder of these sizes, whatever its strides; None where there is none."""
    sizes = {preset: [getattr(of, name) for name in ENCODER_SIZES] for preset, of in PRESETS.items()}
    wanted = [getattr(network, name) for name in ENCODER_SIZES]
    return next((preset for preset, found in sizes.items() if found == wanted), None)


def _plan_command(source: Source, preset: str) -> str:
    """The command that gives the plans of a dataset the network of a preset, and leaves its voxels as they are."""
    number, plans = source.dataset[7:10], source.plans_name
    if is_mim_prepared(source.folder):
        return mim_prepare_command(number, source.spacing_zyx, plans, f" --preset {preset}")
    return f"mim_plan -d {number} -c {source.configuration} -o {plans} --preset {preset}"


def config_for_data(settings: Mapping[str, Any], source: Source, shapes: np.ndarray | None = None) -> PretrainConfig:
    """The config of a run; views, fields of view and tokens that are not set suit the data.

    Args:
        settings: of `merge_settings`.
        source: one of the datasets; all have its spacing and channels.
        shapes: (N, 3) voxels of the cases. None: they are not known yet, and the config has the smallest view, to
            check all other settings.

    Raises:
        MiMError: the settings cannot work.
    """
    strides = suitable_strides(source.spacing)
    network = _network_of(settings, strides)
    if shapes is None:
        smallest: Size3 = tuple(2 * p for p in network.token_size)  # type: ignore[assignment]
        return _build_config(settings, source.in_channels, smallest, PretrainConfig.scale, strides)
    median = tuple(np.median(shapes, axis=0))
    if "view_size" in settings:
        view = _triple(settings["view_size"])
    else:
        view = suitable_view(median, network.token_size)
        if settings.get("encoder") == "resenc":
            view = fitting_view(settings["architecture"], view, network.token_size)
    ladder = settings.get("ladder", PretrainConfig.ladder)
    scale = settings.get("scale") or suitable_scale(ladder, view, median, network.token_size)
    return _build_config(settings, source.in_channels, view, scale, strides)


def _build_config(
    settings: Mapping[str, Any], in_channels: int, view: Size3, scale: Size3, strides: tuple[Size3, ...] | None = None
) -> PretrainConfig:
    """The config of a run.

    Args:
        settings: of `merge_settings`; everything else has its default.
        in_channels: of the data.
        view, scale, strides: where the settings do not say them; strides of the network's stages, None: the preset's.

    Raises:
        MiMError: the settings cannot work.
    """
    network = _network_of(settings, strides)
    preset = settings.get("preset", PretrainConfig.preset)
    defaults = {"view_size": view, "scale": scale, "learning_rate": DEFAULT_LEARNING_RATE[preset]}
    values = {**defaults, **settings, "network": asdict(network), "in_channels": in_channels}
    return PretrainConfig.from_dict({**values, "view_size": _triple(values["view_size"])})


def _network_of(settings: Mapping[str, Any], strides: tuple[Size3, ...] | None = None) -> NetworkConfig:
    """Sizes of the preset, with these strides, and what `network` changes. Raises MiMError as `_build_config`."""
    preset = settings.get("preset", PretrainConfig.preset)
    if preset not in PRESETS:
        raise MiMError(f"unknown preset '{printable(preset)}': choose one of {', '.join(PRESETS)}")
    defaults = asdict(PRESETS[preset]) | ({"strides": strides} if strides is not None else {})
    return network_from_dict({**defaults, **settings.get("network", {})})


def _triple(value: Any) -> Size3:
    """One number for all axes, or three."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, 3):
        raise MiMError(f"--view takes one number or three, got {len(values)}")
    return tuple(values * 3 if len(values) == 1 else values)  # type: ignore[return-value]


def write_config(config: PretrainConfig, path: Path) -> None:
    """Write all settings of a run as YAML; `--config` reads them again."""
    write_atomically(path, yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None).encode())


def all_settings_table() -> str:
    """Every setting with its default and meaning, as a Markdown table; docs/config.md holds it too."""
    rows = [*settings_table(PretrainConfig), *settings_table(NetworkConfig, "network.")]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])
