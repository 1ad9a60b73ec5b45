"""Compiles the Triton kernels down to machine code, without a GPU, and says what each has come to.

    python benchmarks/gpu/kernel_machine_code.py [--presets small] [--archs 80 90] [--dtypes bf16] [--fused] [--json]

Of every stage of pretraining (view of 64 for tiny and small, 96 for base and large), or with --finetuning of whole
patches of 128, the depthwise kernels; with --fused those of fused_triton.py for the channels of a preset. Registers of
a thread, bytes that it spills to memory, instructions, those that multiply and add (FFMA).
Triton brings the assembler and disassembler. Kernels are compiled for the constants that they are launched with; the
input gradient is the convolution with the flipped kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nnunet_mim.config import PRESETS
from nnunet_mim.networks import depthwise_triton as kernels
from nnunet_mim.networks import fused_triton as fused

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNEL = 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VIEW = {"tiny": 64, "small": 64, "base": 96, "large": 96}
PATCH = 128
POINTERS = {
    "weight_ptr": "*fp32", "bias_ptr": "*fp32", "partial_ptr": "*fp32", "ids": "*i64", "views": "*i64", "table": "*i32",
}  # fmt: skip
FUSED_ARGUMENTS = {"mean_ptr": "*fp32", "scale_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
COLUMNS = ("kernel", "stage", "channels", "dtype", "arch", "registers", "spilled", "instructions", "ffma")


def stages(preset, whole_patches=False):
    """(name, grid, token, channels) of every stage."""
    network = PRESETS[preset]
    size = list(network.token_size)
    grid = [1, 1, 1] if whole_patches else [VIEW[preset] // p for p in size]
    token = [PATCH] * 3 if whole_patches else size
    for stage in range(3):
        token = [t // s for t, s in zip(token, network.strides[stage], strict=True)]
        yield f"{preset} {stage + 1}{' patch' * whole_patches}", grid, token, network.embed_dims[stage]


def compiled(kernel, constants, dtype, arch, pointers=POINTERS):
    """Machine code of a kernel whose pointers are aligned, as torch's are."""
    names = kernel.arg_names
    kinds = {name: pointers.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in kinds.items() if kind[0] == "*"}
    source = ASTSource(kernel, kinds, values, aligned)
    options = {"num_warps": kernels.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]


def machine_code(cubin):
    """Registers, spilled bytes, instructions, and those that multiply and add."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["-c"]))
        )
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", code)
    ffma = sum(name.startswith(("FFMA", "FHFMA")) for name in names)  # FFMA2: two at once, FHFMA: of half precision
    return {"registers": registers, "spilled": stack + local, "instructions": len(names), "ffma": ffma}


def rows(chosen, dtypes, archs):
    """A dict of COLUMNS per kernel of the chosen of `stages`."""
    for stage, grid, token, channels in chosen:
        for dtype in dtypes:
            x = torch.empty(1, *token, channels, dtype=DTYPES[dtype], device="meta")
            forward = kernels.convolution_constants(x, grid, token, KERNEL) | {"FLIP": False, "HAS_BIAS": True}
            backward = kernels.gradient_constants(x, grid, token, KERNEL)
            made = [
                ("convolution", kernels._convolve_kernel, forward),
                ("weight gradient", kernels._weight_gradient_kernel, backward),
            ]
            if dtype == "bf16":  # that of a pretraining step
                mirrored = forward | {"FLIP": True, "HAS_BIAS": False}
                made.append(("input gradient", kernels._convolve_kernel, mirrored))
            for name, kernel, constants in made:
                for arch in archs:
                    row = {"kernel": name, "stage": stage, "channels": channels, "dtype": dtype, "arch": arch}
                    yield row | machine_code(compiled(kernel, constants, dtype, arch))


def fused_rows(presets, archs):
    """A dict of COLUMNS per fused kernel, for every number of channels of a preset, in bf16."""
    for preset in presets:
        network = PRESETS[preset]
        dims = sorted({*network.embed_dims, network.decoder_embed_dim})
        for channels in dims:
            hidden = round(channels * network.mlp_ratio)
            height, width = fused._rows_of_norm(channels)
            of_norm = {"C": channels, "ROWS": height, "CHANNELS": width}
            of_gelu = {"C": hidden, "ROWS": fused.TILE // fused.COLUMNS, "COLUMNS": fused.COLUMNS}
            for kernel, constants in (
                (fused._bias_gelu_kernel, of_gelu), (fused._bias_gelu_backward_kernel, of_gelu),
                (fused._add_norm_kernel, of_norm), (fused._add_norm_backward_kernel, of_norm),
                (fused._norm_gelu_kernel, of_norm), (fused._norm_gelu_backward_kernel, of_norm),
            ):  # fmt: skip
                for arch in archs:
                    row = {"kernel": kernel.__name__, "stage": preset, "channels": constants["C"], "dtype": "bf16"}
                    code = machine_code(compiled(kernel, constants, "bf16", arch, FUSED_ARGUMENTS))
                    yield row | {"arch": arch} | code


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    add("--archs", nargs="+", type=int, default=[90], help="compute capabilities, such as 80 90 100 120")
    add("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    add("--stages", nargs="+", type=int, default=[1, 2, 3], choices=[1, 2, 3])
    add("--finetuning", action="store_true", help="whole patches instead of visible tokens")
    add("--fused", action="store_true", help="the kernels of bias, GELU, addition and LayerNorm instead")
    add("--json", action="store_true")
    options = parser.parse_args()
    chosen = [
        stage for preset in options.presets for stage in stages(preset, options.finetuning)
        if int(stage[0].split()[1]) in options.stages
    ]  # fmt: skip
    found = []
    print(f"triton {triton.__version__}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    depthwise = rows(chosen, options.dtypes, options.archs)
    for row in fused_rows(options.presets, options.archs) if options.fused else depthwise:
        found.append(row)
        print("| " + " | ".join(str(row[column]) for column in COLUMNS) + " |", flush=True)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "rows": found}))


if __name__ == "__main__":
    main()
