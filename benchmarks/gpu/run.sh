#!/usr/bin/env bash
# Everything that needs a real GPU, in two calls of at most ten minutes each, most valuable first:
#
#   bash benchmarks/gpu/run.sh 1 OUTPUT_FOLDER     # correctness, then times and memory of all presets
#   bash benchmarks/gpu/run.sh 2 OUTPUT_FOLDER     # finetuning beside ResEnc-L, compiled steps, two devices, real CT
#
# Needs the package with its dev extra. Every item has a limit of seconds; one that fails or takes too long is noted in
# summary.md, and the next begins. What an item prints lies in OUTPUT_FOLDER as it comes. Set DATASET (and nnU-Net's
# three variables) to pretrain on real CT; PLANS are nnUNetMiMPlans unless set.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
part=${1:?1 or 2} out=${2:?folder for the results}
mkdir -p "$out"

item() {  # item NAME SECONDS COMMAND...
    local name=$1 seconds=$2 start=$SECONDS left=$((590 - SECONDS))
    shift 2
    if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
    if [ "$seconds" -lt 10 ]; then echo "| $name | no time left | |" | tee -a "$out/summary.md"; return; fi
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]} what=done
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then what="stopped after $seconds s"; elif [ "$code" -ne 0 ]; then what="failed ($code)"; fi
    echo "| $name | $what | $((SECONDS - start)) s |" | tee -a "$out/summary.md"
}

python - <<'PYTHON' | tee -a "$out/summary.md" || exit
import torch, triton
assert torch.cuda.is_available(), "no CUDA device"
print(f"\n{torch.cuda.get_device_name()}, {torch.cuda.device_count()} devices, torch {torch.__version__}, triton {triton.__version__}\n")
print("| item | outcome | seconds |\n|---|---|---|")
PYTHON
if [ "$part" = 1 ]; then
    item kernels 90 pytest -q tests/unit/networks/test_depthwise_triton.py tests/unit/networks/test_fused_triton.py
    item tests 150 pytest -q -m gpu tests/unit tests/e2e/test_gpu.py --deselect tests/e2e/test_gpu.py::test_the_whole_way_on_the_gpu
    item base 90 python benchmarks/gpu/gpu_paths.py --no-check --presets base --modes recorded --json
    item small 60 python benchmarks/gpu/gpu_paths.py --no-check --presets small --view 64 --batch 8 --children 2 2 --modes recorded --json
    item large 90 python benchmarks/gpu/gpu_paths.py --no-check --presets large --modes recorded --json
    item monitoring 30 python benchmarks/monitor_overhead.py --device cuda --preset base --view 96 --json
    item paths 150 python benchmarks/gpu/gpu_paths.py --presets tiny base --modes eager recorded --json
else
    item finetune 150 python benchmarks/finetune_step.py --device cuda --patch 128 128 128 --repeats 10 --json
    item compiled 150 python benchmarks/gpu/gpu_paths.py --no-check --presets base --modes compiled --json
    item tiles 60 python benchmarks/gpu/depthwise_tiles.py
    if [ -n "${DATASET:-}" ]; then
        pretrain=(mim_pretrain -d "$DATASET" -p "${PLANS:-nnUNetMiMPlans}" -f 0 --preset base --iterations 1500 --val_every 500)
        item dry_run 60 "${pretrain[@]}" -o run_sh --dry-run
        item real_ct 150 "${pretrain[@]}" -o run_sh
        if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
            item two_devices 60 "${pretrain[@]}" -o run_sh_two --batch 4 -num_gpus 2 --dry-run
            item one_device 60 "${pretrain[@]}" -o run_sh_two --batch 4 --dry-run
        fi
    fi
    item dense 60 python benchmarks/step_time.py --device cuda --preset base --view 96 --batch 2 --ratio 0.6
    item demo 120 mim_demo -o "$out/demo" -device cuda
    if [ -n "${DATASET:-}" ]; then
        for type in float16 bfloat16 float32; do  # does lr 3e-3 fall apart, or the precision?
            item "curve_$type" 90 python benchmarks/finetune_curve.py -d "$DATASET" -p "${PLANS:-nnUNetMiMPlans}" \
                -tr nnUNetTrainerMiMScratch --iterations 250 --set lr=0.003 --autocast "$type" -device cuda --threads 4
        done
    fi
fi
cat "$out/summary.md"
