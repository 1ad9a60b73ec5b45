#!/usr/bin/env bash
# Checks and times what needs a GPU: bash benchmarks/gpu/run.sh [OUTPUT_FOLDER]. Needs the package with its dev extra.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"

python - <<'PYTHON'
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "GPUs", torch.cuda.device_count())
PYTHON
pytest -m gpu
pytest tests/unit/networks/test_depthwise_triton.py
python benchmarks/gpu/depthwise_tiles.py | tee "$out/depthwise_tiles.md"
python benchmarks/gpu/gpu_paths.py --json | tee "$out/gpu_paths.md"
python benchmarks/step_time.py --device cuda --preset base --view 96 --batch 2 --ratio 0.6 | tee "$out/step_time.md"
python benchmarks/finetune_step.py --device cuda --patch 128 128 128 --repeats 10 --json | tee "$out/finetune_step.md"
mim_demo -o "$out/demo" -device cuda
echo "tables in $out; the demo's page, with the time of each stage: $out/demo/index.html"
