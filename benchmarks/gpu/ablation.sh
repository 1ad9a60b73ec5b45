#!/usr/bin/env bash
# The ablation of the GPU: pretrains the variants of benchmarks/ablation.py and judges each by finetuning, with the few-shot
# protocol, against the same control from random weights (and, for the narrow window, one with that window). What a variant
# costs is in the first table (crops a second).
#
#   bash benchmarks/gpu/ablation.sh DATASET "UNLABELLED_DATASETS" [OUTPUT_FOLDER]
#   bash benchmarks/gpu/ablation.sh 501 800
#   VARIANTS="default one_level" LABELS="5 all" bash benchmarks/gpu/ablation.sh 501 800
#   NARROW=nnUNetMiMCtNarrow bash benchmarks/gpu/ablation.sh 501 800
#
# The datasets have been prepared as for few_shot.sh. NARROW: plans of the same datasets that differ in the window alone
# (mim_prepare --set ct_window=-103,164 -p NARROW, the rest as before), for the variant narrow_window. Repeat the command after an
# interruption. Settings are variables, all in settings.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
number=$1 others=${2:-}
. "$here/settings.sh"
variants=${VARIANTS:-default default_seed_1 one_level two_levels native no_alignment cosine mask_less mask_more scale_1}
narrow=${NARROW:-}
tag=ablation_$tag
out=${3:-$nnUNet_results/$folder/gpu_$tag}
mkdir -p "$out"

for dataset in $number $others; do
    python "$here/../preset_plans.py" -d "$dataset" --preset "$preset" -o "nnUNetMiMFewShot_$preset"
    [ -z "$narrow" ] || python "$here/../preset_plans.py" -d "$dataset" -p "$narrow" --preset "$preset" -o "nnUNetMiMAblationNarrow_$preset"
done
arms=(Scratch) with_narrow=()
if [ -n "$narrow" ]; then
    variants="$variants narrow_window" with_narrow=(--narrow "nnUNetMiMAblationNarrow_$preset")
    arms+=("ScratchNarrow=nnUNetTrainerMiMScratch:nnUNetMiMAblationNarrow_$preset")
fi

# shellcheck disable=SC2206  # words of these variables are arguments
protocol=(mim_benchmark few_shot -d "$number" -p "nnUNetMiMFewShot_$preset" -f "$fold" --labels $labels
    --seeds "$seeds" $length -device "$device" --jobs "$jobs" --set $recipe -o "$out")
[ -f "$out/table.csv" ] || "${protocol[@]}" --arms "${arms[@]}" --dry-run  # what is wrong is said before the pretraining

say "pretraining"
# shellcheck disable=SC2086
python "$here/../ablation.py" -d "$number" $others -p "nnUNetMiMFewShot_$preset" -f "$fold" -o "$tag" --only $variants "${with_narrow[@]}" \
    -- -device "$device" $pretraining > "$out/probe.part"
mv "$out/probe.part" "$out/probe.md"
cat "$out/probe.md"

say "finetuning"
for variant in $variants; do
    plans=nnUNetMiMFewShot_$preset
    if [ "$variant" = narrow_window ]; then plans=nnUNetMiMAblationNarrow_$preset; fi
    run=$nnUNet_results/$folder/MiMPretrain_${tag}_${variant}__${plans}__3d_fullres/fold_$fold
    arms+=("$variant=nnUNetTrainerMiM:$plans:$run/checkpoint_final.pth")
done
"${protocol[@]}" --arms "${arms[@]}"
say "done: $out/probe.md and $out/report.html"
