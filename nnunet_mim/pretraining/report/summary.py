"""What a checkpoint of `mim_pretrain` is, in words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import Any

from nnunet_mim.checkpoint.format import settings_of
from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, UNPICKLED
from nnunet_mim.checkpoint.metadata import require_description
from nnunet_mim.checkpoint.units import Units
from nnunet_mim.config import DEFAULT_LEARNING_RATE, PRESETS, PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.geometry import level_number, levels_of, views_per_crop
from nnunet_mim.pretraining.monitoring.figures import Measurement, measurements_of
from nnunet_mim.pretraining.monitoring.verdict import Verdict, verdict_on

Table = list[list[str]]
"""rows of cells, the first row being the heading"""

NOTE = """\
The network predicts the pattern inside each masked token, normalised to mean 0 and standard deviation 1; that is all
that the loss asks for. To show it as an image, the true mean and standard deviation of each token are put back. So the
overall brightness and contrast of a token are given, only the pattern in it is the network's work."""


class Facts:
    """A checkpoint, as `load_checkpoint` returns it, read for its reader.

    Args:
        checkpoint: what was loaded.
        path: named in errors.

    Raises:
        MiMError: its settings are of another version, or it does not say where its weights come from.
    """

    def __init__(self, checkpoint: Mapping[str, Any], path: Path | str = "the checkpoint") -> None:
        self.checkpoint = checkpoint
        self.provenance: Mapping[str, Any] = checkpoint["provenance"]
        self.config = settings_of(checkpoint, path)
        try:
            levels_of(self.config)
        except MiMError as error:
            raise MiMError(f"{path}, mim_config: {error}") from error
        require_description(self.provenance, self.config.in_channels, str(path))
        self.units = Units.of(self.provenance)
        self.history = measurements_of(self.provenance["loss_history"])  # oldest first
        self.last = self.history[-1] if self.history else Measurement[float]()
        self.spacing = tuple(self.provenance["spacing"])  # mm, array order; empty where it is unknown
        self.token_size = self.config.network.token_size

    def verdict(self) -> Verdict:
        return verdict_on(self.history, self.config)

    def verdict_text(self) -> str:
        """The verdict with a capital and a full stop; empty where nothing was measured."""
        sentence = self.verdict().sentence
        return f"{sentence[0].upper()}{sentence[1:]}." if self.history else ""

    def probe_dice(self) -> list[float]:
        """Mean Dice of every label probe, oldest first."""
        return [row.probe.dice for row in self.history if row.probe.dice is not None]

    def network_text(self) -> str:
        """`tiny: encoder …, decoder …, 5.0 million parameters (…)`."""
        network, weights = self.config.network, self.checkpoint["network_weights"]
        if self.config.encoder == "resenc":  # some weights are there under two names
            millions = sum({weight.data_ptr(): weight.numel() for weight in weights.values()}.values()) / 1e6
            stages = self.config.architecture["arch_kwargs"]["features_per_stage"]
            stages = join(stages, "-") if isinstance(stages, list | tuple) else stages
            return f"nnU-Net's residual encoder U-Net, features {stages}; {millions:.2f} million parameters"
        counts = Counter({"encoder": 0, "decoder": 0, "projectors": 0})
        for name, weight in weights.items():
            counts[name.split(".")[0]] += weight.numel()
        encoder = f"encoder {join(network.embed_dims, '-')} with {join(network.depths, '-')} blocks"
        decoder = f"decoder of width {network.decoder_embed_dim} with {network.decoder_depth} blocks"
        parts = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items() if count)
        preset = self.config.preset if PRESETS.get(self.config.preset) == network else f"{self.config.preset}, changed"
        return f"{preset}: {encoder}, {decoder}; {sum(counts.values()) / 1e6:.2f} million parameters ({parts})"


def facts_table(facts: Facts, held_out: Mapping[str, int] | None = None) -> Table:
    """What a reader wants to know first: two columns, a heading and a text; held_out: number of cases by dataset."""
    provenance, config = facts.provenance, facts.config
    fold = "no fold left out" if provenance["fold"] == "all" else f"fold {provenance['fold']} left out"
    trained = Counter(case["dataset"] for case in provenance["cases"])
    cases = []
    for dataset in dict.fromkeys([*trained, *(held_out or {})]):
        beside = "" if held_out is None else f", {held_out.get(dataset, 0)} held out"
        cases.append(f"{dataset}: {trained[dataset]} cases trained on{beside}")
    rows = [["network", facts.network_text()], ["data", "; ".join(cases) or "unknown cases"]]
    if provenance["plans_name"]:
        rows.append(["plans", f"{provenance['plans_name']}, {provenance['configuration']}, {fold}"])
    mm = join([f"{s:.3g}" for s in facts.spacing])
    spacing = f"{mm} mm, in the order of the plans" if mm else "unknown"
    rows += [["spacing", spacing], ["intensities", _intensity_text(facts)]]
    if "converted_from" in provenance:
        rows.append(["training", f"converted from {provenance['converted_from']}"])
    else:
        done = f"{provenance['iterations']} of {config.iterations} iterations"
        rows.append(["training", f"{done} of {config.batch_size} crops"])
    if skipped := len(provenance.get("skipped_steps", ())):
        rows[-1][1] += f", {skipped} skipped for want of a finite gradient"
    if config.init_checkpoint:
        rows.append(["started from", config.init_checkpoint])
    if learnt := _features_text(facts):
        rows.append(["features", learnt])
    rows.append(["written by", f"nnunet_mim {facts.checkpoint.get('mim_version', 'of an unknown version')}"])
    return rows


def _intensity_text(facts: Facts) -> str:
    """How voxels were normalised, channel by channel."""
    texts = []
    for channel, scheme in enumerate(facts.units.normalization):
        window = facts.units.hounsfield_window(channel)
        if window is None:
            texts.append(scheme)
        else:
            std, mean = facts.units.scale(channel)
            minus = f", minus {mean:g}" if mean else ""
            texts.append(f"{scheme}, {window[0]:g} to {window[1]:g} HU{minus}, divided by {std:g}")
    groups = [(text, len(list(group))) for text, group in groupby(texts)]
    return "; ".join(text if count == 1 else f"{count} channels: {text}" for text, count in groups)


def levels_table(facts: Facts) -> Table:
    """Geometry of the levels: sizes in array order."""
    levels = levels_of(facts.config)
    table = [["level", "field of view, voxels", "mm", "seen as", "tokens masked", "views a crop"]]
    for position, (level, count) in enumerate(zip(levels, views_per_crop(levels), strict=True)):
        mm = join([f"{n * s:.0f}" for n, s in zip(level.fov, facts.spacing, strict=True)]) if facts.spacing else "?"
        masked = f"{level.n_tokens - level.n_visible_tokens} of {level.n_tokens}"
        name = f"level {level_number(position, len(levels))}"
        table.append([name, join(level.fov), mm, join(level.view_size), masked, str(count)])
    return table


def losses_table(facts: Facts) -> Table:
    """Last held-out losses beside trivial predictors; only the heading where nothing has been measured."""
    table = [["level", "guess: token's mean", "guess: nearest voxels", "network", "at the start", "PSNR (nearest)"]]
    for level in facts.last.reconstructed:
        losses = level.guesses.token_mean, level.guesses.infill, level.reconstruction
        start = facts.history[0].level(level.number).reconstruction
        psnr = f"{_figure_text(level.psnr, 1)} ({_figure_text(level.guesses.infill_psnr, 1)}) dB"
        table.append([level.title, *(_figure_text(loss) for loss in (*losses, start)), psnr])
    if all(level.psnr is None for level in facts.last.reconstructed):
        table = [row[:-1] for row in table]
    if any(level.unet is not None for level in facts.last.reconstructed):
        column = ["U-Net", *(_figure_text(level.unet) for level in facts.last.reconstructed)]
        table = [[*row, cell] for row, cell in zip(table, column, strict=True)]
    return table


def losses_text(last: Measurement[float]) -> str:
    """Held-out reconstruction beside the trivial predictors, one line per level, for a terminal."""
    lines = ["held-out reconstruction loss   token mean   in-filling   network"]
    if any(level.unet is not None for level in last.reconstructed):
        lines[0] += "     U-Net"
    for level in last.reconstructed:
        guesses = f"{_figure_text(level.guesses.token_mean):>10}   {_figure_text(level.guesses.infill):>10}"
        unet = "" if level.unet is None else f"   {_figure_text(level.unet):>7}"
        lines.append(f"  {level.name:28} {guesses}   {_figure_text(level.reconstruction):>7}{unet}")
    if not last.reconstructed:
        lines.append("  no level was measured: no held-out crop has a token without padding or air in it")
    return "\n".join(lines)


def datasets_table(facts: Facts) -> Table:
    """Cases, crops and last held-out losses of each dataset; losses only where there are several."""
    levels = facts.last.reconstructed
    table = [["dataset", "cases", "crops", *(level.title for level in levels)]]
    trained = Counter(case["dataset"] for case in facts.provenance["cases"])
    for dataset, crops in facts.provenance.get("crops_seen", {}).items():
        losses = [_figure_text(level.datasets.get(dataset)) for level in levels]
        table.append([dataset, str(trained[dataset]), str(crops), *losses])
    return table


def _features_text(facts: Facts) -> str:
    """Last alignment, spread of features and label probe, as far as they were measured."""
    parts = []
    for level in facts.last.reconstructed:
        if level.alignment_top1 is not None:
            chance = "" if level.alignment_chance is None else f" (chance {level.alignment_chance:.1%})"
            parts.append(f"{level.title} finds its place in {level.alignment_top1:.0%} of views{chance}")
    if facts.last.feature_rank is not None:
        of_width = f" of {facts.config.network.embed_dims[-1]}" if facts.config.encoder == "hybrid" else ""
        parts.append(f"effective rank of the encoder's features {facts.last.feature_rank:.0f}{of_width}")
    if dice := facts.probe_dice():
        start = f" ({dice[0]:.2f} at the start)" if len(dice) > 1 else ""
        parts.append(f"label probe Dice {dice[-1]:.2f}{start}")
    return "; ".join(parts)


def settings_and_defaults(facts: Facts) -> tuple[Table, list[int]]:
    """Every setting, default and meaning, and the numbers of rows (1: first below the heading) that are not default."""
    config = facts.config
    defaults = PretrainConfig(preset=config.preset if config.preset in PRESETS else "base")
    table, marked = [["setting", "value", "default", "meaning"]], []
    for prefix, now, usual in (("", config, defaults), ("network.", config.network, defaults.network)):
        for field in fields(now):
            if field.name in ("network", "architecture"):
                continue
            value, default = getattr(now, field.name), getattr(usual, field.name)
            if field.name == "learning_rate":
                default = DEFAULT_LEARNING_RATE[defaults.preset]
            elif field.name == "preset":
                default = PretrainConfig().preset
            by_data = field.name in ("view_size", "scale", "in_channels")
            if value != default and not by_data:
                marked.append(len(table))
            text = "by data" if by_data else _setting_text(default)
            table.append([prefix + field.name, _setting_text(value), text, field.metadata.get("meaning", "")])
    return table, marked


def commands(facts: Facts, path: Path) -> list[str]:
    """How to finetune from a checkpoint at `path`: lines for a shell."""
    provenance, path = facts.provenance, Path(quote(str(path)))
    configuration = quote(str(provenance["configuration"]))
    fold = 0 if provenance["fold"] == "all" else quote(str(provenance["fold"]))
    plans = quote(str(provenance["plans_name"]))
    if facts.config.encoder == "resenc":
        dataset = quote(str((provenance["datasets"] or ["DATASET"])[0]))
        command = f"nnUNetv2_train {dataset} {configuration} {fold} -p {plans} -pretrained_weights {path}"
        return [f"# {UNPICKLED}", command]
    train = "nnUNetv2_train {} {} {} -tr nnUNetTrainerMiM -p {}"
    lines = []
    if provenance["datasets"]:
        own = quote(str(provenance["datasets"][0])[7:].split("_")[0])
        command = train.format(own, configuration, fold, plans)
        run = path.parent.parent.name
        tagged = run.startswith("MiMPretrain_") and not run.startswith("MiMPretrain__")  # is not found by itself
        named = f"{ENV_CHECKPOINT}={path} " if tagged else ""
        lines += ["# its own dataset", f"{named}{command}", "# another one"]
    kept = "" if configuration == "3d_fullres" else f" -c {configuration}"
    return [
        *lines,
        f"mim_plan -d DATASET -pc {path}{kept}",
        f"nnUNetv2_preprocess -d DATASET -plans_name nnUNetMiMPlans -c {configuration}",
        train.format("DATASET", configuration, 0, "nnUNetMiMPlans"),
    ]


def _figure_text(figure: float | None, digits: int = 3) -> str:
    return "–" if figure is None else f"{figure:.{digits}f}"


def join(values: Sequence[Any], by: str = " × ") -> str:
    return by.join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def _setting_text(value: Any) -> str:
    """A setting, such as `64, 64, 64`."""
    if isinstance(value, tuple):
        return ", ".join(f"({_setting_text(v)})" if isinstance(v, tuple) else _setting_text(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"
