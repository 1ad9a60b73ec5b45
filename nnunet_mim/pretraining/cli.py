"""`mim_pretrain`. Its flags are fields of PretrainConfig, DataOptions and RunOptions."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.locate import ENV_CHECKPOINT, FINAL, UNPICKLED, write_pointers
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.pretraining.options import DataOptions, RunOptions
from nnunet_mim.settings import check_given_once, parse_settings
from nnunet_mim.system.cli import OneLineParser, add_flags, given_flags
from nnunet_mim.system.locks import exclusive_lock
from nnunet_mim.system.untrusted import read_yaml

FREQUENT_MEASURING = 0.1
"""share of a run above which fewer measurements are advised"""

DESCRIPTION = """\
Pretrain the MiM encoder (Mask in Mask, arXiv 2404.15580) on CT that nnU-Net has preprocessed. No labels are used.

  mim_pretrain -d 501                            stock nnUNetPlans, base network, 3d_fullres
  mim_pretrain -d 501 -p nnUNetMiMPlans          plans of mim_plan or mim_prepare, and the network in them
  mim_pretrain -d 501 -p nnUNetMiMPlans -f 0     leave fold 0's validation cases out, for an honest comparison
  mim_pretrain -d 501 502 800 -p nnUNetMiMPlans  several datasets with the same spacing and intensity window
  mim_pretrain -d 501 --c                        continue an interrupted run, with its own settings
  mim_pretrain -d 501 --dry-run                  measure a few steps: time, memory and disk of the whole run
  mim_pretrain -d 501 --preset tiny --view 64 --iterations 2000 -device cpu     a small run without a GPU

Afterwards: nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMiM (same -p)."""

EPILOG = """\
Output, in nnUNet_results/DatasetXXX_Name/MiMPretrain[_TAG]__PLANS__CONFIGURATION/fold_X:
  checkpoint_final.pth    what nnUNetTrainerMiM loads;  checkpoint_latest.pth while training, for --c
  train.csv, val.csv      losses per level; tensorboard/ holds the same curves
The val columns are measured on held-out cases; level1 is the widest view. A reconstruction loss below both baselines
(token_mean: predicting each token's mean; infill: copying the nearest visible voxels) shows that something is learned.
Bad input ends with exit code 2 and one line that says what to do."""


class _ListSettings(argparse.Action):
    """Print all settings and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nnunet_mim.pretraining.configure import all_settings_table

        print(all_settings_table())
        parser.exit()


def _build_parser() -> OneLineParser:
    """The command line of mim_pretrain."""
    parser = OneLineParser(
        "mim_pretrain",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add_flags(parser, "data and output", DataOptions)
    add_flags(parser, "what is computed", PretrainConfig)
    add_flags(parser, "how this machine computes it", RunOptions)
    add = parser.add_argument_group("other settings").add_argument
    add(
        "--config",
        metavar="FILE.yaml",
        help="settings from a file; flags and --set override it. Every run leaves its own in config.yaml",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any setting (see --list_settings), such as weight_decay=0.1 or network.depths=2,2,2,6",
    )
    add("--list_settings", action=_ListSettings, nargs=0, help="print every setting with its default, then exit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 after a one-line error, or 75 if a signal has stopped the run."""
    typed = _build_parser().parse_args(argv)
    from nnunet_mim.pretraining.stopping import EXIT_CODE, StoppedError

    try:
        return exit_code(lambda: run(typed))
    except StoppedError as stopped:
        print(stopped)
        return EXIT_CODE


def run(typed: argparse.Namespace) -> Path:
    """Check everything, then train. Heavy imports come after the command line is read, so that --help is quick.

    Returns:
        path of the final checkpoint; with --dry-run it is not written.
    """
    where = DataOptions(**given_flags(typed, DataOptions))
    options = RunOptions(**given_flags(typed, RunOptions))
    import torch

    from nnunet_mim.pretraining import setup
    from nnunet_mim.pretraining.configure import merge_settings, write_config
    from nnunet_mim.pretraining.distributed.launch import (
        device_count,
        end_process_group,
        is_first_rank,
        launched_fabric,
        say,
    )
    from nnunet_mim.pretraining.dry_run import dry_run
    from nnunet_mim.pretraining.loop import pretrain
    from nnunet_mim.pretraining.report.summary import losses_text
    from nnunet_mim.pretraining.step import full_memory_named

    if options.device == "cuda" and not torch.cuda.is_available():
        raise MiMError("no CUDA device found: add -device cpu (slow; try --view 64, with stock plans --preset tiny)")
    devices, nodes = device_count(options.num_gpus)
    options = options.resolved(devices)
    from_file = _settings_of_file(Path(typed.config)) if typed.config else {}
    flags, further = given_flags(typed, PretrainConfig), parse_settings(typed.set)
    check_given_once(flags, further)
    settings = merge_settings(from_file, flags, further)

    sources = setup.find_sources(where)
    folder, *others = [setup.output_folder(source, where) for source in sources]
    if not options.dry_run and setup.is_finished(folder, where.resume):
        say(f"finished already: {folder / FINAL}")
        write_pointers(others, folder / FINAL)
        return folder / FINAL
    job = setup.set_up(settings, sources, folder, where, options, devices * nodes)
    if options.dry_run:
        fabric = launched_fabric(options.device, devices, nodes, options.precision)
        say(f"{job.summary()}\n{dry_run(job, fabric)}")
        return folder / FINAL
    busy = f"another mim_pretrain writes to {folder}: wait until it has ended, or choose a tag with -o"
    with exclusive_lock(folder.with_name(f".{folder.name}.lock"), busy) if is_first_rank() else nullcontext():
        fabric = launched_fabric(options.device, devices, nodes, options.precision)
        say(f"{job.summary()}\noutput {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        if fabric.is_global_zero:
            write_config(job.config, folder / "config.yaml")
        with full_memory_named(job):
            record = pretrain(job, fabric)
        if fabric.is_global_zero:
            write_pointers(others, folder / FINAL)
    say(losses_text(record.last))
    say(record.verdict())
    say(_measuring_text(record.measuring_share, job.config))
    say(f"wrote {folder / FINAL}")
    say(f"next: {next_command(folder / FINAL, where, sources[0].dataset, job.config.encoder)}")
    end_process_group()
    return folder / FINAL


def _settings_of_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file. MiMError names the file where one is unknown, of another kind, or no network."""
    from nnunet_mim.networks.resenc import check_resenc
    from nnunet_mim.nnunet.documents import check_architecture
    from nnunet_mim.pretraining.configure import merge_settings

    content = read_yaml(path)
    try:
        merge_settings(content)
    except MiMError as error:
        raise MiMError(f"{path}: {error}") from None
    if content.get("architecture"):
        remedy = "leave it out, and the network is that of the plans"
        check_architecture(f"{path}: architecture", content["architecture"], remedy)
        check_resenc(content["architecture"], str(path))
    return content


def next_command(checkpoint: Path, where: DataOptions, dataset: str, encoder: str) -> str:
    """The command that finetunes the checkpoint of a run; one with a tag has to be named."""
    train = f"nnUNetv2_train {dataset} {where.configuration} {where.fold_number or 0}"
    if encoder == "resenc":
        return f"{train} -pretrained_weights {checkpoint} -p {where.plans}  # {UNPICKLED}"
    named = f"{ENV_CHECKPOINT}={checkpoint} " if where.tag else ""
    return f"{named}{train} -tr nnUNetTrainerMiM -p {where.plans}"


def _measuring_text(share: float, config: PretrainConfig) -> str:
    """What the measurements have cost, and what to change where that is much."""
    text = f"measurements on held-out cases took {share:.1%} of the time"
    rarer = [f"--val_every ({config.val_every})"] if config.val_every < config.iterations else []
    rarer += [f"--set probe_every ({config.probe_every})"] if 0 < config.probe_every < config.iterations else []
    return f"{text}: raise {' and '.join(rarer)}" if rarer and share > FREQUENT_MEASURING else text


if __name__ == "__main__":
    sys.exit(main())
