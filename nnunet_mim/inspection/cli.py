"""`mim_inspect`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nnunet_mim.config import CHECKPOINTS
from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.system.cli import OneLineParser

DESCRIPTION = """\
Says what a pretraining checkpoint is: network, data, units, losses beside trivial predictors, whether it has learnt
something, and how to finetune from it. Nothing in the file is run.

With -i it also runs the network on CT that you give. It writes FOLDER/report.html with pictures, and NIfTI files of
every level's view (input, masked, reconstruction, mask) that lie over the CT in any viewer."""

EPILOG = """\
examples:
  mim_inspect checkpoint_final.pth
  mim_inspect --list_weights
  mim_inspect checkpoint_final.pth -i patient.nii.gz other.nrrd -o looks

A network for several channels takes as many files per case, in their order.
Bad input ends with exit code 2 and one line that says what to do."""


class _ListWeights(argparse.Action):
    """Prints the weights that come with the package, then ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from nnunet_mim.inspection.describe import shipped_text

        print(shipped_text())
        parser.exit()


def _parser() -> OneLineParser:
    parser = OneLineParser("mim_inspect", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT",
        help=f"{CHECKPOINTS}; or file of mim_convert")
    add("--list_weights", action=_ListWeights, nargs=0, help="list the weights that come with the package, then exit")
    add("-i", nargs="+", default=[], metavar="CT",
        help="raw CT: NIfTI, NRRD or MHA, or a folder with the DICOM files of one CT")  # fmt: skip
    add("-o", metavar="FOLDER", help="folder for the page and the images (default: ./mim_inspect)")
    add("-device", choices=["cpu", "cuda", "mps"], default="cpu", help="runs the network (default: cpu)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the masks (default: 0)")
    add("--spacing", nargs=3, type=float, metavar="MM",
        help="voxel size in array order, for a checkpoint that does not state its own (default: the CT's)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    import torch

    from nnunet_mim.checkpoint.format import load_checkpoint
    from nnunet_mim.inspection.describe import description
    from nnunet_mim.pretraining.report.summary import Facts

    if args.device != "cpu" and not getattr(torch, args.device).is_available():
        raise MiMError(f"no {args.device} device found: leave out -device")
    if args.spacing is not None and min(args.spacing) <= 0:
        given = " ".join(f"{s:g}" for s in args.spacing)
        raise MiMError(f"--spacing {given} (array order): millimetres must be above 0")
    path = Path(args.checkpoint)
    facts = Facts(load_checkpoint(args.checkpoint), path)
    print(description(facts, path))
    if not args.i and args.o is None:
        return

    from nnunet_mim.inspection.show import show

    print()
    folder, files = Path(args.o or "mim_inspect"), [Path(file) for file in args.i]
    for line in show(facts, path, files, folder, args.device, args.seed, args.spacing):
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
