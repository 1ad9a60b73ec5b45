"""`mim_convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_mim.errors import MiMError, exit_code
from nnunet_mim.system.cli import OneLineParser

DESCRIPTION = """\
Turn a pretraining checkpoint of the published MiM architecture (base: 48-96-192-384, decoder 576x8) into one of this
package. Names change, and the first convolution is rescaled from intensities in [0, 1] to HU / 250; the result computes
the same. Nothing in the file is run: one with other content than tensors, plain containers and argparse.Namespace is
refused."""

EPILOG = """\
Afterwards:
  mim_plan -d 501 -pc out.pth
  nnUNetv2_preprocess -d 501 -plans_name nnUNetMiMPlans -c 3d_fullres
  nnUNetv2_train 501 3d_fullres 0 -tr nnUNetTrainerMiM -p nnUNetMiMPlans
The file says nothing about which cases were pretrained on: a validation case may have been among them.
Bad input ends with exit code 2 and one line that says what to do."""


def _parser() -> OneLineParser:
    parser = OneLineParser("mim_convert", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("published", metavar="PUBLISHED.pth", help="checkpoint of the published code")
    add("-o", required=True, metavar="OUT.pth", help="new file to write")
    add("--window", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="HU that the published pretraining mapped to 0 and 1 (default: -1000 1000)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    source, target = Path(args.published), Path(args.o)
    if target.exists():
        raise MiMError(f"{target} exists already: choose another name with -o")
    if not target.absolute().parent.is_dir():
        raise MiMError(f"-o {target}: the folder {target.absolute().parent} does not exist")

    from nnunet_mim.checkpoint.format import save_atomically
    from nnunet_mim.checkpoint.published import COMPUTED, LICENCE_NOTE, PUBLISHED_WINDOW, convert

    checkpoint = convert(source, tuple(args.window) if args.window else PUBLISHED_WINDOW)
    save_atomically(checkpoint, target)
    weights = checkpoint["network_weights"]
    values = sum(tensor.numel() for tensor in weights.values())
    print(f"{len(weights) + len(COMPUTED)} tensors: {len(weights)} converted ({values:,} values), ", end="")
    print(f"{len(COMPUTED)} position embeddings checked, which are computed here")
    print(f"note: {LICENCE_NOTE}")
    print(f"wrote {target}\nnext: mim_plan -d DATASET -pc {target}")


if __name__ == "__main__":
    sys.exit(main())
