"""MiM plans with the network of another preset, for the data that are there: nothing is preprocessed again.

    python benchmarks/preset_plans.py -d 501 -p nnUNetMiMPlans --preset small -o nnUNetMiMFewShot_small [--like PLANS]

With --like, the copy has those plans' intensities, reader and preprocessed data: a control with stock nnU-Net's window.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from nnunet_mim.config import PRESETS
from nnunet_mim.geometry import suitable_strides
from nnunet_mim.networks.hybrid_unet import plans_architecture
from nnunet_mim.nnunet.datasets import dataset_name

CONFIGURATION = "3d_fullres"
OF_THE_DATA = (
    "foreground_intensity_properties_per_channel",
    "image_reader_writer",
    "transpose_forward",
    "transpose_backward",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-p", default="nnUNetMiMPlans", metavar="PLANS")
    parser.add_argument("--preset", required=True, choices=PRESETS)
    parser.add_argument("-o", required=True, metavar="PLANS", help="name of the plans to write")
    parser.add_argument("--like", metavar="PLANS", help="whose intensities, reader and data to take")
    options = parser.parse_args()
    folder = Path(os.environ["nnUNet_preprocessed"], dataset_name(options.d))
    plans = json.loads((folder / f"{options.p}.json").read_text())
    configuration = plans["configurations"][CONFIGURATION]
    network = replace(PRESETS[options.preset], strides=suitable_strides(tuple(configuration["spacing"])))
    configuration["architecture"] = plans_architecture(network, tuple(configuration["patch_size"]))
    plans["plans_name"] = options.o
    if options.like:
        like = json.loads((folder / f"{options.like}.json").read_text())
        plans |= {key: like[key] for key in OF_THE_DATA}
        configuration["data_identifier"] = like["configurations"][CONFIGURATION]["data_identifier"]
    (folder / f"{options.o}.json").write_text(json.dumps(plans, indent=2))


if __name__ == "__main__":
    main()
