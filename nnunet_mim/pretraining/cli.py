"""`mim_pretrain`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nnunet_mim.checkpoint.locate import locate, write_pointer
from nnunet_mim.config import PretrainConfig
from nnunet_mim.errors import MiMError
from nnunet_mim.pretraining.parser_cli import build_parser, settings_of
from nnunet_mim.settings import parse_settings, read_yaml

DEFAULT_VIEWS_PER_PASS = {"cpu": 4}
"""per device, else 32: all views of the last level of two crops"""

MUCH_MEASURING = 0.1
"""share of a run above which fewer measurements are advised"""


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 2 after a one-line error, or 75 if a signal has stopped the run."""
    args = build_parser().parse_args(argv)
    from nnunet_mim.pretraining.stopping import EXIT_CODE, StoppedError

    try:
        run(args)
    except StoppedError as stopped:
        print(stopped)
        return EXIT_CODE
    except MiMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Check everything, then train. Heavy imports come after the command line is read, so that --help is quick."""
    import torch

    from nnunet_mim.checkpoint.format import FINAL
    from nnunet_mim.nnunet.datasets import require_environment
    from nnunet_mim.nnunet.source import find_source, orientation_warning, require_same_units, window_warning
    from nnunet_mim.nnunet.splits import fold_validation_cases
    from nnunet_mim.pretraining import setup as runs
    from nnunet_mim.pretraining.configure import merge_settings, write_config
    from nnunet_mim.pretraining.data.loading import default_workers
    from nnunet_mim.pretraining.distributed.launch import device_count, end_process_group, launched_fabric, say
    from nnunet_mim.pretraining.dry_run import dry_run
    from nnunet_mim.pretraining.loop import RunOptions, pretrain
    from nnunet_mim.pretraining.report.summary import losses_text

    require_environment()
    fold = "all" if args.f == "all" else _fold(args.f)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise MiMError("no CUDA device found: add -device cpu (slow; try --preset tiny --view 64)")
    if args.compile and args.device == "cpu":
        raise MiMError("--compile is for a GPU: on a CPU the step has a faster convolution of its own without it")
    views_per_pass = DEFAULT_VIEWS_PER_PASS.get(args.device, 32) if args.views_per_pass is None else args.views_per_pass
    devices, nodes = device_count(args.num_gpus)
    workers = default_workers(args.device, devices) if args.workers is None else args.workers
    if args.shard and devices * nodes == 1:
        raise MiMError("--shard spreads the network over several devices: add -num_gpus N, or leave it out")
    options = RunOptions(
        workers, views_per_pass, tuple(args.recompute), args.compile, args.record, args.strict, args.shard
    )
    from_file = read_yaml(Path(args.config)) if args.config else {}
    given = merge_settings(from_file, settings_of(args), parse_settings(args.set))
    if given.get("init_checkpoint"):
        given["init_checkpoint"] = str(locate(given["init_checkpoint"]))

    sources = [find_source(dataset, args.p, args.c) for dataset in args.d]
    require_same_units(sources)
    first = sources[0]
    given = runs.with_architecture(given, first)
    runs.check_settings(given, first, devices * nodes)
    folder = runs.output_folder(first, fold, args.o)

    def point_to(checkpoint: Path) -> None:
        for other in sources[1:]:
            write_pointer(runs.output_folder(other, fold, args.o), checkpoint)

    if not args.dry_run and not runs.check_output_folder(folder, args.resume):
        say(f"finished already: {folder / FINAL}")
        point_to(folder / FINAL)
        return
    if fold != "all":
        for source in sources:
            fold_validation_cases(source, int(fold))  # says now what is wrong with the fold
    stored = runs.resumable_checkpoint(folder) if args.resume else None
    settings = merge_settings(stored["mim_config"], given) if stored is not None else given
    if settings.get("encoder") == "resenc" and (args.shard or args.recompute):
        raise MiMError("--shard and --recompute are for --encoder hybrid: leave them out")
    if settings.get("init_checkpoint") and stored is None:
        runs.check_init(settings, first)
    for warning in [*map(window_warning, sources), orientation_warning(sources)]:
        if warning:
            say(f"warning: {warning}")

    cases, bad = runs.index_sources(sources, args.strict)
    for line in bad:
        say(f"warning: left out: {line}")
    if bad:
        say(f"warning: {len(bad)} cases are left out, {len(cases)} are used (--strict makes this an error)")
    config = runs.config_for_data(settings, first, cases.column("shapes"))
    data = runs.run_data(cases, fold, config)
    if stored is not None:
        runs.check_same_run(stored, config, data.train)

    precision: Any = args.precision or ("bf16-mixed" if args.device == "cuda" else "32-true")
    fabric = launched_fabric(args.device, devices, nodes, precision)
    say(runs.describe(config, data))
    if args.dry_run:
        say(dry_run(config, data, fabric, options, folder))
        return
    say(f"output {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if fabric.is_global_zero:
        write_config(config, folder / "config.yaml")
    result = pretrain(config, data, folder, fabric, args.resume, options)
    if fabric.is_global_zero:
        point_to(folder / FINAL)
    say(losses_text(result.figures))
    say(result.verdict)
    say(measuring_text(result.measuring_share, config))
    say(f"wrote {folder / FINAL}")
    next_fold = 0 if fold == "all" else fold
    how = f"-pretrained_weights {folder / FINAL}" if config.encoder == "resenc" else "-tr nnUNetTrainerMiM"
    say(f"next: nnUNetv2_train {first.dataset} {args.c} {next_fold} {how} -p {args.p}")
    end_process_group()


def measuring_text(share: float, config: PretrainConfig) -> str:
    """What the measurements have cost, and what to change where that is much."""
    text = f"measurements on held-out cases took {share:.1%} of the time"
    rarer = [f"--val_every ({config.val_every})"] if config.val_every < config.iterations else []
    rarer += [f"--set probe_every ({config.probe_every})"] if 0 < config.probe_every < config.iterations else []
    return f"{text}: raise {' and '.join(rarer)}" if rarer and share > MUCH_MEASURING else text


def _fold(text: str) -> int:
    if not text.isdigit():
        raise MiMError(f"-f takes 'all' or a fold number, got '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
