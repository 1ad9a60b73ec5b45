"""`mim_export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nnunet_mim.config import CHECKPOINTS
from nnunet_mim.errors import exit_code
from nnunet_mim.system.cli import OneLineParser

DESCRIPTION = """\
Write a pretraining as a folder that can be shared: model.safetensors, config.json and a model card (README.md).

  mim_export checkpoint_final.pth -o my_encoder --licence cc-by-4.0 --data "1200 abdominal CT, public, cc-by-4.0"
  mim_plan -d 501 -pc my_encoder                 the folder stands for the checkpoint; so does its name on Hugging Face

Names of cases are left out; hashes of their voxels stay, so that finetuning can warn about validation cases that were
pretrained on."""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "mim_export",
        description=DESCRIPTION,
        epilog="Bad input ends with exit code 2 and one line that says what to do.",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help=CHECKPOINTS)
    add("-o", required=True, metavar="FOLDER", help="new folder to write")
    add("--licence", metavar="ID", help="of the weights, such as cc-by-4.0 (default: not stated)")
    add("--data", metavar="TEXT", help="for the card: which images, and under which licence (default: not stated)")
    add("--half", action="store_true", help="weights in float16: half the size, for a finetuning as good")
    add("--with_names", action="store_true", help="keep the identifiers of the cases")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from nnunet_mim.checkpoint.format import load_checkpoint
    from nnunet_mim.checkpoint.share import export
    from nnunet_mim.pretraining.report.card import model_card
    from nnunet_mim.pretraining.report.summary import Facts

    folder = Path(args.o)
    checkpoint = load_checkpoint(args.checkpoint)
    card = model_card(Facts(checkpoint, args.checkpoint), args.licence, args.data)
    export(checkpoint, card, folder, args.with_names, args.half)
    for name, value in (("--licence", args.licence), ("--data", args.data)):
        if not value:
            print(f"note: {name} is not given; the card says so")
    print(f"wrote {folder}\nnext: mim_plan -d DATASET -pc {folder}")


if __name__ == "__main__":
    sys.exit(main())
