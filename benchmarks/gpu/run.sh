#!/usr/bin/env bash
# Checks and times what needs a GPU: bash benchmarks/gpu/run.sh [OUTPUT_FOLDER]. Needs the package with its dev extra.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-$(mktemp -d)}

python - <<'PYTHON'
import torch
assert torch.cuda.is_available(), "no CUDA device"
print(torch.cuda.get_device_name(), "torch", torch.__version__, "GPUs", torch.cuda.device_count())
PYTHON
pytest -m gpu tests/e2e/test_gpu.py
mim_demo -o "$out/demo" -device cuda
echo "the demo's page, with the time of each stage: $out/demo/index.html"
