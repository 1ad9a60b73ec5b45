#!/usr/bin/env bash
# The few-shot experiment of the GPU: pretrains, then compares MiM, its control, the control with nnU-Net's own intensities
# (a narrow window, its own reader) and stock nnU-Net's two networks at the same spacing, patch and batch.
#
#   bash benchmarks/gpu/few_shot.sh DATASET "UNLABELLED_DATASETS" [OUTPUT_FOLDER]
#   bash benchmarks/gpu/few_shot.sh 501 800
#   PRESET=base SEEDS=5 bash benchmarks/gpu/few_shot.sh 501 800
#
# DATASET has been prepared by mim_prepare or mim_plan (nnUNetMiMPlans), the others by mim_prepare with the same spacing. Repeat
# the command after an interruption. Settings are variables:
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
number=$1 others=${2:-}
device=${DEVICE:-cuda} preset=${PRESET:-small} fold=${FOLD:-0}
pretraining=${PRETRAINING:---view 64 --iterations 20000 --batch 8 --children 2 2 --scale 1 2 2 --val_every 1000}
labels=${LABELS:-5 10 20 all} seeds=${SEEDS:-3} jobs=${JOBS:-6}
length=${LENGTH:---iterations 1000 --iterations_per_epoch 50 --val_iterations 5}
recipe=${RECIPE:-lr=0.001 layer_decay=1 oversample_foreground=0.33}  # stock nnU-Net's share of patches with foreground
tag=few_shot_${preset}_$(cksum <<< "$others $pretraining" | cut -d' ' -f1)  # another pretraining is another run

say() { echo "[$(date +%H:%M:%S)] $*"; }
folder=$(python -c "import sys; from nnunet_mim.dataset_name import dataset_name; print(dataset_name(sys.argv[1]))" "$number")
plans=$nnUNet_preprocessed/$folder
out=${3:-$nnUNet_results/$folder/gpu_$tag}

say "plans"
# the dataset's MiM plans with the network of the preset, and once more with nnU-Net's intensities; the data stay where they are
python "$here/../stock_plans.py" -d "$number"
python - "$plans" "$preset" <<'PYTHON'
import json, sys
from dataclasses import replace
from pathlib import Path
from nnunet_mim.config import PRESETS
from nnunet_mim.geometry import suitable_strides
from nnunet_mim.networks.hybrid_unet import plans_architecture
folder, size = Path(sys.argv[1]), sys.argv[2]
mim, stock = (json.loads((folder / f"{name}.json").read_text()) for name in ("nnUNetMiMPlans", "nnUNetPlainLikeMiM"))
configuration = mim["configurations"]["3d_fullres"]
network = replace(PRESETS[size], strides=suitable_strides(tuple(configuration["spacing"])))  # as mim_pretrain chooses them
configuration["architecture"] = plans_architecture(network, tuple(configuration["patch_size"]))
mim["plans_name"] = f"nnUNetMiMFewShot_{size}"
(folder / f"nnUNetMiMFewShot_{size}.json").write_text(json.dumps(mim, indent=2))
for key in ("foreground_intensity_properties_per_channel", "image_reader_writer", "transpose_forward", "transpose_backward"):
    mim[key] = stock[key]
configuration["data_identifier"] = stock["configurations"]["3d_fullres"]["data_identifier"]
mim["plans_name"] = f"nnUNetMiMFewShotNarrow_{size}"
(folder / f"nnUNetMiMFewShotNarrow_{size}.json").write_text(json.dumps(mim, indent=2))
PYTHON
stamp=$plans/nnUNetPlainLikeMiM_3d_fullres.complete  # beside the cases: nnU-Net looks at every file among them
if ! cmp -s "$plans/nnUNetPlainLikeMiM.json" "$stamp"; then
    nnUNetv2_preprocess -d "$number" -plans_name nnUNetPlainLikeMiM -c 3d_fullres -np "${PROCESSES:-4}"
    cp "$plans/nnUNetPlainLikeMiM.json" "$stamp"
fi

# shellcheck disable=SC2206,SC2054  # words of these variables are arguments
protocol=(python -m nnunet_mim.benchmarking.few_shot -d "$number" -p "nnUNetMiMFewShot_$preset" --fold "$fold" --labels $labels
    --seeds "$seeds" $length -device "$device" --jobs "$jobs" --set $recipe -o "$out" --arms Scratch
    "ScratchNarrow=nnUNetTrainerMiMScratch:nnUNetMiMFewShotNarrow_$preset"
    nnUNet=nnUNetTrainer:nnUNetPlainLikeMiM nnUNetNoMirror=nnUNetTrainerNoMirroring:nnUNetPlainLikeMiM
    ResEncLNoMirror=nnUNetTrainerNoMirroring:nnUNetResEncLLikeMiM)
[ -f "$out/table.csv" ] || "${protocol[@]}" --dry-run  # what is wrong with the arms is said before the pretraining

say "pretraining"
run=$nnUNet_results/$folder/MiMPretrain_${tag}__nnUNetMiMPlans__3d_fullres/fold_$fold
again=()
if [ -f "$run/checkpoint_latest.pth" ] || [ -f "$run/checkpoint_final.pth" ]; then again=(--c); fi
# shellcheck disable=SC2086
mim_pretrain -d "$number" $others -p nnUNetMiMPlans -f "$fold" -o "$tag" --preset "$preset" -device "$device" $pretraining "${again[@]}"

say "finetuning"
"${protocol[@]}" "MiM=nnUNetTrainerMiM:nnUNetMiMFewShot_$preset:$run/checkpoint_final.pth"
say "done: $out/report.html"
