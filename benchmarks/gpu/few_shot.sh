#!/usr/bin/env bash
# The few-shot experiment of the GPU: pretrains, then compares MiM, its control, the control with nnU-Net's own intensities
# (a narrow window, its own reader) and stock nnU-Net's two networks at the same spacing, patch and batch.
#
#   bash benchmarks/gpu/few_shot.sh DATASET "UNLABELLED_DATASETS" [OUTPUT_FOLDER]
#   bash benchmarks/gpu/few_shot.sh 501 800
#   PRESET=base SEEDS=5 bash benchmarks/gpu/few_shot.sh 501 800
#
# DATASET has been prepared by mim_prepare or mim_plan (nnUNetMiMPlans), the others by mim_prepare with the same spacing. Repeat
# the command after an interruption. Settings are variables, all in settings.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
number=$1 others=${2:-}
. "$here/settings.sh"
tag=few_shot_$tag
plans=$nnUNet_preprocessed/$folder
out=${3:-$nnUNet_results/$folder/gpu_$tag}

say "plans"
# the datasets' MiM plans with the network of the preset, and once more with nnU-Net's intensities; the data stay where they are
python "$here/../stock_plans.py" -d "$number"
for dataset in $number $others; do
    python "$here/../preset_plans.py" -d "$dataset" --preset "$preset" -o "nnUNetMiMFewShot_$preset"
done
python "$here/../preset_plans.py" -d "$number" --preset "$preset" -o "nnUNetMiMFewShotNarrow_$preset" --like nnUNetPlainLikeMiM
stamp=$plans/nnUNetPlainLikeMiM_3d_fullres.complete  # beside the cases: nnU-Net looks at every file among them
if ! cmp -s "$plans/nnUNetPlainLikeMiM.json" "$stamp"; then
    nnUNetv2_preprocess -d "$number" -plans_name nnUNetPlainLikeMiM -c 3d_fullres -np "${PROCESSES:-4}"
    cp "$plans/nnUNetPlainLikeMiM.json" "$stamp"
fi

# shellcheck disable=SC2206,SC2054  # words of these variables are arguments
protocol=(mim_benchmark few_shot -d "$number" -p "nnUNetMiMFewShot_$preset" -f "$fold" --labels $labels
    --seeds "$seeds" $length -device "$device" --jobs "$jobs" --set $recipe -o "$out" --arms Scratch
    "ScratchNarrow=nnUNetTrainerMiMScratch:nnUNetMiMFewShotNarrow_$preset"
    nnUNet=nnUNetTrainer:nnUNetPlainLikeMiM nnUNetNoMirror=nnUNetTrainerNoMirroring:nnUNetPlainLikeMiM
    ResEncLNoMirror=nnUNetTrainerNoMirroring:nnUNetResEncLLikeMiM)
[ -f "$out/table.csv" ] || "${protocol[@]}" --dry-run  # what is wrong with the arms is said before the pretraining

say "pretraining"
run=$nnUNet_results/$folder/MiMPretrain_${tag}__nnUNetMiMFewShot_${preset}__3d_fullres/fold_$fold
again=()
if [ -f "$run/checkpoint_latest.pth" ] || [ -f "$run/checkpoint_final.pth" ]; then again=(--c); fi
# shellcheck disable=SC2086
mim_pretrain -d "$number" $others -p "nnUNetMiMFewShot_$preset" -f "$fold" -o "$tag" -device "$device" $pretraining "${again[@]}"

say "finetuning"
"${protocol[@]}" "MiM=nnUNetTrainerMiM:nnUNetMiMFewShot_$preset:$run/checkpoint_final.pth"
say "done: $out/report.html"
