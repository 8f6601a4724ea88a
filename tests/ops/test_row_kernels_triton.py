"""The Triton kernels without a GPU: numerics in the interpreter, and what the compiler makes of them for an H100.

A failure here means wrong gradients, or memory traffic above the minimum, on the machines that training runs on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from nemo_ssopd.ops import row_kernels_triton as kernels

ROOT = Path(__file__).parents[2]
H100 = GPUTarget("cuda", 90, 32)
DTYPES = ["bf16", "fp16", "fp32"]
# Kernel -> its types; LOGITS stands for a pointer to logits.
SIGNATURES: dict[str, dict[str, str]] = {
    "_statistics_kernel": {"logits_ptr": "LOGITS", "stats_ptr": "*fp32", "row_stride": "i32", "num_rows": "i32"},
    "_kl_sums_kernel": {
        "student_ptr": "LOGITS",
        "teacher_ptr": "LOGITS",
        "norms_ptr": "*fp32",
        "sums_ptr": "*fp32",
        "student_stride": "i32",
        "teacher_stride": "i32",
        "num_rows": "i32",
        "clip": "fp32",
    },
    "_kl_gradient_kernel": {
        "student_ptr": "LOGITS",
        "teacher_ptr": "LOGITS",
        "norms_ptr": "*fp32",
        "unclipped_mass_ptr": "*fp32",
        "upstream_ptr": "*fp32",
        "out_ptr": "LOGITS",
        "student_stride": "i32",
        "teacher_stride": "i32",
        "out_stride": "i32",
        "num_rows": "i32",
        "clip": "fp32",
    },
    "_logprob_gradient_kernel": {
        "logits_ptr": "LOGITS",
        "max_ptr": "*fp32",
        "log_sum_ptr": "*fp32",
        "targets_ptr": "*i64",
        "upstream_ptr": "*fp32",
        "out_ptr": "LOGITS",
        "logits_stride": "i32",
        "out_stride": "i32",
    },
}


@pytest.fixture(scope="module")
def interpreter_errors() -> dict[str, dict[str, float]]:
    worker = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_worker"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert worker.returncode == 0, worker.stderr
    return json.loads(worker.stdout)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("one column", 2e-5),
        ("no tokens", 2e-5),
        ("no columns", 2e-5),
        ("odd", 2e-5),
        ("several splits", 2e-5),
        ("-inf", 2e-5),
        ("large", 1e-3),  # the interpreter rounds the multiply-add twice, which no GPU does
        ("bfloat16", 5e-3),  # the largest gradient may be rounded the other way: one unit is 2^-8
        ("float16", 1e-3),
    ],
)
def test_interpreter_matches_torch(interpreter_errors: dict, case: str, tolerance: float) -> None:
    assert len(interpreter_errors[case]) == 7
    wrong = {name: error for name, error in interpreter_errors[case].items() if not error < tolerance}
    assert not wrong


def compile_for_h100(name: str, dtype: str) -> CompiledKernel:
    """As the launcher would for Qwen3's vocabulary: pointers, strides and width are multiples of 16."""
    function = getattr(kernels, name)
    constants = {"SPLIT": kernels.SPLIT_COLUMNS, "BLOCK": kernels.BLOCK, "HAS_UPSTREAM": True}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    types = {**SIGNATURES[name], "width": "i32"}
    signature = {
        argument: "constexpr" if argument in constants else types[argument].replace("LOGITS", f"*{dtype}")
        for argument in function.arg_names
    }
    divisible = [
        (index,)
        for index, argument in enumerate(function.arg_names)
        if signature[argument].startswith("*") or argument.endswith("_stride") or argument == "width"
    ]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={path: [["tt.divisibility", 16]] for path in divisible},
    )
    return triton.compile(source, target=H100, options={"num_warps": kernels.NUM_WARPS})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SIGNATURES))
def test_compiles_for_h100_with_wide_loads_and_no_spills(name: str, dtype: str, tmp_path: Path) -> None:
    compiled = compile_for_h100(name, dtype)
    logits_pointers = sum(kind == "LOGITS" for kind in SIGNATURES[name].values())
    written = 1 if "out_ptr" in SIGNATURES[name] else 0
    # 2048 columns over 128 threads are 16 logits per thread: 2 accesses of 16 bytes for 2-byte logits, 4 for fp32.
    accesses = 4 if dtype == "fp32" else 2
    ptx = compiled.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == (logits_pointers - written) * accesses
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == written * accesses

    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert resources["STACK"] == 0 and resources["LOCAL"] == 0, usage
    # 65536 registers hold 4 programs of 128 threads then: 32 KB of bf16 loads in flight on each multiprocessor, where
    # 3.35 TB/s over 132 of them at 600 ns of latency need 15 KB.
    assert resources["REG"] <= 128, usage  # triton 3.6 takes up to 114
