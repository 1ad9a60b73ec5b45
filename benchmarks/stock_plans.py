"""Plans of stock nnU-Net with the spacing, patch and batch of given MiM plans, for comparisons on equal terms.

    python benchmarks/stock_plans.py -d 501 -p nnUNetMiMPlans [-c 3d_fullres]

Writes nnUNetPlainLikeMiM (PlainConvUNet) and nnUNetResEncLLikeMiM (nnU-Net's ResEnc-L network) beside the MiM plans,
with the intensities and resampling that nnU-Net itself plans for the dataset; both use the same preprocessed data that
`nnUNetv2_preprocess -d 501 -plans_name nnUNetPlainLikeMiM -c 3d_fullres` writes. nnU-Net's planner chooses everything,
but strides and number of stages are those of its rule for this patch.
"""

import argparse
import json
import os
from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
)

from nnunet_mim.nnunet.datasets import dataset_name

PLANNERS = {"nnUNetPlainLikeMiM": ExperimentPlanner, "nnUNetResEncLLikeMiM": nnUNetPlannerResEncL}
DATA = f"{next(iter(PLANNERS))}_3d_fullres"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, metavar="DATASET")
    parser.add_argument("-p", default="nnUNetMiMPlans", metavar="PLANS")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION")
    options = parser.parse_args()
    dataset = dataset_name(options.d)
    folder = Path(os.environ["nnUNet_preprocessed"], dataset)
    mim = json.loads((folder / f"{options.p}.json").read_text())["configurations"][options.c]
    for name, planner_class in PLANNERS.items():
        planner = planner_class(dataset, plans_name=name, overwrite_target_spacing=[float(s) for s in mim["spacing"]])
        planner.plan_experiment()
        file = folder / f"{name}.json"
        plans = json.loads(file.read_text())
        configuration = plans["configurations"]["3d_fullres"]
        if configuration["spacing"] != [float(s) for s in mim["spacing"]]:
            raise SystemExit(
                f"nnU-Net turns the axes to {configuration['spacing']} mm: only for an order as in {options.p}"
            )
        like(configuration, mim, planner)
        plans["configurations"] = {"3d_fullres": configuration}
        file.write_text(json.dumps(plans, indent=2))
        print(f"wrote {file}")


def like(configuration, mim, planner):
    """Give a configuration the patch and batch of another; the network's stages follow."""
    spacing, patch = mim["spacing"], mim["patch_size"]
    _, strides, kernels, planned, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    if list(map(int, planned)) != list(patch):
        raise SystemExit(
            f"nnU-Net would enlarge the patch {patch} to {list(map(int, planned))}: plan MiM with that one"
        )
    network = configuration["architecture"]["arch_kwargs"]
    n = len(strides)
    network |= {"n_stages": n, "features_per_stage": [min(320, 32 * 2**stage) for stage in range(n)]}
    network |= {"strides": [list(map(int, s)) for s in strides], "kernel_sizes": [list(map(int, k)) for k in kernels]}
    encoder = "n_blocks_per_stage" if "n_blocks_per_stage" in network else "n_conv_per_stage"
    network[encoder] = list(planner.UNet_blocks_per_stage_encoder[:n])
    network["n_conv_per_stage_decoder"] = list(planner.UNet_blocks_per_stage_decoder[: n - 1])
    shared = {key: mim[key] for key in ("patch_size", "batch_size", "batch_dice")}
    configuration |= {**shared, "data_identifier": DATA}


if __name__ == "__main__":
    main()
