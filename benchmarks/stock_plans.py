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

from nnunet_mim.dataset_name import dataset_name

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
    for name, planner in PLANNERS.items():
        planner(dataset, plans_name=name, overwrite_target_spacing=mim["spacing"]).plan_experiment()
        file = folder / f"{name}.json"
        plans = json.loads(file.read_text())
        like(plans["configurations"]["3d_fullres"], mim)
        plans["configurations"] = {"3d_fullres": plans["configurations"]["3d_fullres"]}
        file.write_text(json.dumps(plans, indent=2))
        print(f"wrote {file}")


def like(configuration, mim):
    """Give a configuration the patch and batch of another; the network's stages follow."""
    spacing, patch = mim["spacing"], mim["patch_size"]
    _, strides, kernels, planned, _ = get_pool_and_conv_props(spacing, patch, 4, 999999)
    if list(map(int, planned)) != list(patch):
        raise SystemExit(
            f"nnU-Net would enlarge the patch {patch} to {list(map(int, planned))}: plan MiM with that one"
        )
    network = configuration["architecture"]["arch_kwargs"]
    stages = len(strides)
    features = [min(320, 32 * 2**stage) for stage in range(stages)]
    network |= {"n_stages": stages, "features_per_stage": features}
    network |= {"strides": [list(map(int, s)) for s in strides], "kernel_sizes": [list(map(int, k)) for k in kernels]}
    for name in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        if name in network:
            per_stage = network[name]
            network[name] = (per_stage + per_stage[-1:] * stages)[: stages - name.endswith("decoder")]
    configuration |= {"patch_size": patch, "batch_size": mim["batch_size"], "data_identifier": DATA}


if __name__ == "__main__":
    main()
