"""The Triton kernels as machine code, which Triton's own assembler makes without a GPU."""

import os
import subprocess
import sys

import pytest

from nnunet_mim.config import PRESETS
from nnunet_mim.networks.depthwise import TRITON

pytest.importorskip("triton")

REGISTERS = 240
"""maximum of a thread; above 255 the assembler spills to memory"""
SPILLED = 8
"""maximum bytes of a thread: two values in float32 on sm_80 (12 channels), where the assembler stops at 96 registers"""


def check(found, n_kernels):
    rows = found["rows"]
    assert len(rows) == n_kernels
    assert [row for row in rows if row["spilled"] > SPILLED or row["registers"] > REGISTERS] == []
    assert all(row["ffma"] > 0 for row in rows)
    return rows


def test_instructions_of_a_stage_whose_channels_are_no_multiple_of_16(gpu_benchmark):
    """24 channels; with loads of two bytes the convolution had 1,984 instructions and 242 registers."""
    found = gpu_benchmark("kernel_machine_code.py", "--presets", "small", "--stages", "1", "--archs", "90")
    convolution, weight_gradient, input_gradient = check(found, 3)
    assert convolution["spilled"] == weight_gradient["spilled"] == input_gradient["spilled"] == 0
    newest = tuple(map(int, found["triton"].split(".")[:2])) >= (3, 8)
    most = 900 if newest else 1100  # 792 by Triton 3.8.0, 1,032 by 3.3.1
    assert max(convolution["instructions"], input_gradient["instructions"]) <= most
    assert weight_gradient["instructions"] <= 1400
    assert convolution["ffma"] == weight_gradient["ffma"] == 5 * 8 * 8  # taps, voxels, channels of a thread


def test_fused_kernels_fit_the_registers(gpu_benchmark):
    found = gpu_benchmark("kernel_machine_code.py", "--fused", "--presets", "tiny", "--archs", "90")
    rows = found["rows"]
    assert {row["kernel"] for row in rows} == {
        f"_{name}{end}_kernel" for name in ("bias_gelu", "add_norm", "norm_gelu") for end in ("", "_backward")
    }
    assert [row for row in rows if row["spilled"] or row["registers"] > REGISTERS] == []


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_kernel_fits_the_registers(gpu_benchmark, preset):
    archs = "80", "90", "100", "120"
    flags = "kernel_machine_code.py", "--presets", preset, "--archs", *archs
    check(gpu_benchmark(*flags, "--dtypes", "bf16", "fp16", "fp32"), len(archs) * 3 * (2 * 3 + 1))
    check(gpu_benchmark(*flags, "--dtypes", "fp16", "--finetuning"), len(archs) * 3 * 2)
    fused = gpu_benchmark(*flags, "--fused")["rows"]
    assert [row for row in fused if row["spilled"] or row["registers"] > REGISTERS] == []


@pytest.fixture(scope="module")
def oldest_triton(tmp_path_factory):
    """Folder with the oldest Triton that the package takes, to go before the installed one."""
    folder, version = tmp_path_factory.mktemp("triton"), ".".join(map(str, TRITON))
    command = ["-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"triton=={version}.*"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton {version} cannot be installed here: {done.stderr[-300:]}")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kernels", [(), ("--fused",)])
def test_the_oldest_triton_compiles_every_kernel(gpu_benchmark, oldest_triton, kernels):
    path = os.pathsep.join([str(oldest_triton), *filter(None, [os.environ.get("PYTHONPATH")])])
    flags = "kernel_machine_code.py", *kernels, "--presets", "tiny", "small", "--archs", "80", "90"
    found = gpu_benchmark(*flags, PYTHONPATH=path)
    assert tuple(map(int, found["triton"].split(".")[:2])) == TRITON
    assert found["rows"]
    assert [row for row in found["rows"] if row["spilled"] > SPILLED or row["registers"] > REGISTERS] == []
