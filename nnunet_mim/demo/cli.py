"""`mim_demo`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_mim.checkpoint.locate import shipped_weights
from nnunet_mim.demo.runner import find_command, open_folder, run_stages
from nnunet_mim.demo.stages import MIN_BODIES, QUICK, DemoSettings, Folders, make_stages
from nnunet_mim.errors import INTERRUPTED, MiMError, exit_code
from nnunet_mim.system.cli import OneLineParser

DESCRIPTION = """\
Shows the whole way on CT of made-up bodies, with the commands that you would use on your own data: nnU-Net plans,
mim_plan adapts the plans, nnU-Net preprocesses, mim_pretrain pretrains without labels, nnUNetv2_train finetunes,
nnUNetv2_predict finds the organs of unseen bodies. At the end FOLDER/index.html shows it all.

Everything is kept in FOLDER; nothing outside it is read or written. It takes minutes, also on two CPU cores."""

say = partial(print, flush=True)  # at once, also into a pipe


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, 2 after a one-line error, 130 after Ctrl-C."""
    options = _build_parser().parse_args(argv)
    code = exit_code(lambda: _run(options))
    if code == INTERRUPTED and options.ct is None:
        print(f"to go on: {shlex.join(['mim_demo', '-o', options.o])} --continue", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> None:
    """Check everything, then run the stages and write the page."""
    if options.ct is not None:
        _show_ct(Path(options.ct), Path(options.o))
        return
    settings = QUICK if options.quick else DemoSettings()
    if options.bodies is not None:
        settings = replace(settings, bodies=options.bodies)
    if settings.bodies < MIN_BODIES:
        raise MiMError(f"--bodies {settings.bodies}: give at least {MIN_BODIES}, for nnU-Net's five folds")
    folders = Folders(Path(options.o).expanduser().resolve())

    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stages = make_stages(settings, folders, device)
    for stage in stages:
        if isinstance(stage.run, list):
            find_command(stage.run[0])
    state = open_folder(folders.root, settings, device, options.resume)

    start = time.perf_counter()
    say(f"in {folders.root}; output of the commands in logs/. To run them by hand:")
    for name, value in folders.environment().items():
        say(f"  export {name}={value}")
    run_stages(stages, folders, state, say)

    from nnunet_mim.demo.report import write_report

    say("Write the page")
    dice = write_report(folders, settings, state)
    say(f"mean Dice on {settings.test_bodies} unseen bodies: {dice:.2f}; {time.perf_counter() - start:.0f} s in all")
    say(f"look at {folders.page}")


def _show_ct(image: Path, folder: Path) -> None:
    """A page of what the first weights of the package make of a CT."""
    from nnunet_mim.checkpoint.format import load_checkpoint
    from nnunet_mim.inspection.show import show
    from nnunet_mim.pretraining.report.summary import Facts

    names = shipped_weights()
    if not names:
        raise MiMError("no weights come with this copy of the package: leave out --ct")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MiMError(f"{folder} exists and is not empty: choose another folder with -o")
    facts = Facts(load_checkpoint(names[0]), names[0])
    for line in show(facts, Path(names[0]), [image], folder, "cpu", 0, None):
        say(line)
    say(f"look at {folder / 'report.html'}; next: mim_plan -d DATASET -pc {names[0]}")


def _build_parser() -> OneLineParser:
    parser = OneLineParser("mim_demo", description=DESCRIPTION)
    add = parser.add_argument
    add("-o", default="mim_demo", metavar="FOLDER", help="new folder for all that is made (default: ./mim_demo)")
    add("-device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--bodies", type=int, metavar="N",
        help=f"number of made-up bodies to train on, at least {MIN_BODIES} "
        f"(default: {DemoSettings().bodies}, {QUICK.bodies} with --quick)")  # fmt: skip
    add("--ct", metavar="FILE",
        help="instead: what the weights that come with the package make of your CT (NIfTI, NRRD, MHA, or a folder with "
        "the DICOM files of one CT)")  # fmt: skip
    add("--quick", action="store_true", help="smaller and shorter: shows that all runs, not what it can do")
    add("--c", "--continue", action="store_true", dest="resume",
        help="skip the stages that are done; give the same options")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
