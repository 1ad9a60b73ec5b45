"""From what the user has set to a PretrainConfig: a YAML file, flags, `--set`, or the checkpoint that is continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from nnunet_mim.config import (
    DEFAULT_LEARNING_RATE,
    PRESETS,
    NetworkConfig,
    PretrainConfig,
    Size3,
    field_notes,
    network_from_dict,
)
from nnunet_mim.errors import MiMError
from nnunet_mim.system.files import write_atomically


def merge_settings(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Later parts override earlier ones. `network.depths` and `network: {depths: …}` mean the same.

    Raises:
        MiMError: a name that PretrainConfig does not have, or a value of another kind than its default.
    """
    merged: dict[str, Any] = {"network": {}}
    for part in parts:
        for name, value in part.items():
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


def build_config(
    settings: Mapping[str, Any], in_channels: int, view: Size3, scale: Size3, strides: tuple[Size3, ...] | None = None
) -> PretrainConfig:
    """Settings of a run.

    Args:
        settings: of `merge_settings`; everything else has its default.
        in_channels: of the data.
        view, scale, strides: where the settings do not say them; strides of the network's stages, None: the preset's.

    Raises:
        MiMError: they cannot work.
    """
    network = network_of(settings, strides)
    preset = settings.get("preset", PretrainConfig().preset)
    defaults = {"view_size": view, "scale": scale, "learning_rate": DEFAULT_LEARNING_RATE[preset]}
    values = {**defaults, **{name: value for name, value in settings.items() if name != "network"}}
    values["view_size"] = triple(values["view_size"], "--view")
    return PretrainConfig.from_dict({**values, "network": asdict(network), "in_channels": in_channels})


def network_of(settings: Mapping[str, Any], strides: tuple[Size3, ...] | None = None) -> NetworkConfig:
    """Sizes of the preset, with these strides, and what `network` changes. Raises MiMError as `build_config`."""
    preset = settings.get("preset", PretrainConfig().preset)
    if preset not in PRESETS:
        raise MiMError(f"unknown preset '{preset}': choose one of {', '.join(PRESETS)}")
    defaults = asdict(PRESETS[preset]) | ({"strides": strides} if strides is not None else {})
    return network_from_dict({**defaults, **settings.get("network", {})})


def triple(value: Any, name: str) -> Size3:
    """One number for all axes, or three."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, 3):
        raise MiMError(f"{name} takes one number or three, got {len(values)}")
    return tuple(values * 3 if len(values) == 1 else values)  # type: ignore[return-value]


def _check(settings: Mapping[str, Any], default: Any, prefix: str) -> None:
    known = {f.name: getattr(default, f.name) for f in fields(default)}
    for name, value in settings.items():
        if name not in known:
            raise MiMError(f"unknown setting '{prefix}{name}': mim_pretrain --list_settings shows all of them")
        if name != "network" and not _fits(value, known[name]) and not (name == "view_size" and _fits(value, 1)):
            raise MiMError(f"setting '{prefix}{name}' must be like {_shown(known[name])}, got {value!r}")


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(v, default[0] if default else 0) for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _shown(default: Any) -> str:
    return str(list(default) or [0, 1]) if isinstance(default, tuple) else repr(default)


def write_config(config: PretrainConfig, path: Path) -> None:
    """Write all settings of a run as YAML; `--config` reads them again."""
    write_atomically(path, yaml.safe_dump(config.to_dict(), sort_keys=False, default_flow_style=None).encode())


def settings_table() -> str:
    """Every setting with its default and meaning, as a Markdown table; docs/config.md holds it too."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for prefix, default in (("", PretrainConfig()), ("network.", NetworkConfig())):
        notes = field_notes(type(default))
        for field in fields(default):
            if field.name not in ("network", "architecture", "in_channels"):
                plain = json.loads(json.dumps(getattr(default, field.name)))  # or YAML names what is there twice
                value = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n")
                shown = "by preset" if field.name == "learning_rate" else f"`{value.strip()}`"
                lines.append(f"| `{prefix}{field.name}` | {shown} | {notes.get(field.name, '')} |")
    return "\n".join(lines)
