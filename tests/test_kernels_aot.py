"""Every shipped tile compiles for real targets, with no GPU present: on matrix units, with no register spilled.

The kernels are compiled in a process of their own, since the others may have loaded them for the interpreter. Run as a
script, this file reads configurations as JSON from its standard input and prints what it found in the machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from kfac_triton.kernels import kron_matmul, syrk
from kfac_triton.kernels._launch import Tile

pytest.importorskip("triton")

# Shared memory that one program may use, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HG?MMA", "sm_100": "(UTC)?HMMA", "gfx942": "v_mfma"}


def shipped() -> list[tuple]:
    """(target, kernel, dtype, tile, precision, stride of X that is 1): everything a launcher may choose."""
    configurations = []
    for target in SHARED_LIMIT:
        float32 = ("ieee",) if target == "gfx942" else ("tf32x3", "tf32")
        for dtype in ("fp32", "bf16", "fp16"):
            for precision in float32:  # V of any dtype meets float32 factors
                configurations += [(target, "kron_matmul", dtype, tile, precision, "") for tile in kron_matmul.TILES]
            tiles = syrk.TILES["float32" if dtype == "fp32" else "half"]
            for precision in float32 if dtype == "fp32" else ("ieee",):  # half types have no other precision
                for kernel in ("syrk", "syrk with bias"):
                    configurations += [(target, kernel, dtype, tile, precision, "X_col") for tile in tiles]
                    for unit_stride in ("X_row", ""):
                        configurations += [(target, kernel, dtype, t, precision, unit_stride) for t in tiles[1:]]
    return configurations


ALL = shipped()
# One of each kernel and target: a middle tile, float32 in the precision that is the default there.
SOME = [
    (target, kernel, "fp32", Tile(64, 32, 4, 3), "ieee" if target == "gfx942" else "tf32x3", unit_stride)
    for target in SHARED_LIMIT
    for kernel, unit_stride in (("syrk with bias", "X_col"), ("kron_matmul", ""))
]
assert set(SOME) <= set(ALL)
IEEE = ("sm_80", "syrk", "fp32", Tile(32, 32, 2, 3), "ieee", "X_col")


def name(configuration: tuple) -> str:
    target, kernel, dtype, tile, precision, unit_stride = configuration
    return "-".join((target, kernel.replace(" ", "_"), dtype, "x".join(map(str, tile)), precision, unit_stride))


def examine(configurations: list[tuple]) -> dict[tuple, dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__], input=json.dumps(configurations), capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(configurations, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def some() -> dict[tuple, dict]:
    return examine([*SOME, IEEE])


@pytest.fixture(scope="module")
def every() -> dict[tuple, dict]:
    return examine(ALL)


def check(configuration: tuple, facts: dict) -> None:
    target, kernel, _, _, precision, unit_stride = configuration
    assert facts["matrix"] > 0, "no matrix instruction"
    assert facts["spilled"] == 0, "registers spill"
    assert 0 < facts["shared"] <= SHARED_LIMIT[target]
    # A row of X without a unit stride, and a TF32 operand that must be transposed, can only be copied piece by piece.
    if target != "gfx942" and precision != "tf32" and (unit_stride or kernel == "kron_matmul"):
        assert facts["copies"].keys() == {"16"}, "copies of less than 16 bytes"


@pytest.mark.parametrize("configuration", SOME, ids=name)
def test_one_of_each(some, configuration):
    check(configuration, some[configuration])


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ALL, ids=name)
def test_every_shipped_configuration(every, configuration):
    check(configuration, every[configuration])


def test_float32_multiplies_on_no_matrix_unit_of_nvidia(some):
    """Why "ieee" is not shipped there, and that the count of matrix instructions can be zero."""
    assert some[IEEE]["matrix"] == 0


def compiled(target: str, kernel: str, dtype: str, tile: Tile, precision: str, unit_stride: str):
    from triton.backends.compiler import GPUTarget

    hip = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if hip else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    stages = min(tile.stages, 2) if hip else tile.stages
    if kernel == "kron_matmul":
        return kron_matmul.ahead_of_time(gpu, dtype, tile, stages, precision)
    return syrk.ahead_of_time(gpu, dtype, tile, stages, precision, kernel == "syrk with bias", unit_stride or None)


def facts(target: str, kernel) -> dict:
    """Matrix instructions, bytes of stack (spilled registers), shared memory, asynchronous copies by their width."""
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code))
        instructions, copies = re.findall(r"^\s*(v_\w+)", code, re.M), {}
    else:
        tools = Path(sys.modules["triton"].__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.check_output([tools / "cuobjdump", "--dump-resource-usage", file.name], text=True)
            code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
        spilled = int(re.search(r"STACK:(\d+)", usage)[1])
        instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9]+)", code, re.M)
        widths = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+)", kernel.asm["ptx"])
        copies = {str(int(width, 16)): widths.count(width) for width in set(widths)}
    matrix = sum(re.match(MATRIX_INSTRUCTIONS[target], mnemonic) is not None for mnemonic in instructions)
    return {"matrix": matrix, "spilled": spilled, "shared": kernel.metadata.shared, "copies": copies}


if __name__ == "__main__":
    for target, kernel, dtype, tile, precision, unit_stride in json.load(sys.stdin):
        found = facts(target, compiled(target, kernel, dtype, Tile(*tile), precision, unit_stride))
        print(json.dumps(found), flush=True)
