"""Every kernel, compiled for GPUs that need not be there: registers, shared memory, no spills."""

import ast
import functools
import json
import os
import re
import subprocess
import sys

import host
import pytest

from fishleg_ext.ops.dispatch import OPS

KERNELS = host.ROOT / "kernels"
NVCC = os.environ.get("CUDACXX") or host.find_nvcc()
# name -> file, of all that triton.jit compiles but functions that others call, which begin with _.
TRITON_KERNELS = {
    node.name: file.name
    for file in sorted(KERNELS.glob("*.py"))
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
}
SLOW = pytest.mark.slow
TABLE = "registers, spills and static shared memory"
SOURCES = sorted(host.CSRC.glob("*.cu"))


@functools.cache
def compiled(capability):
    """What compile_triton.py printed: rows of kernel, arguments, registers, spills, shared."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, host.ROOT / "tests" / "compile_triton.py", str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["rows"]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=SLOW), 90, pytest.param(100, marks=SLOW)])
@pytest.mark.parametrize("name", TRITON_KERNELS)
def test_triton_kernels_compile_without_spills(name, capability, record_table):
    rows = [row for row in compiled(capability) if row["kernel"] == name]
    assert rows, f"no launcher of kernels/{TRITON_KERNELS[name]} launches {name} on the cases of fishleg-ext check"
    for row in rows:
        assert row["spills"] == 0, row
        doubles, scalars = "*fp64" in row["arguments"], re.findall(r"(\w+)=fp32", row["arguments"])
        assert not (doubles and scalars), f"a GPU gets {scalars} rounded to float32, the interpreter does not"
        record_table(TABLE, kernel=name, target=f"sm_{capability}", **dict(list(row.items())[1:]))


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_cuda_kernels_compile_without_spills(source, capability, tmp_path, record_table):
    options = ["-std=c++17", f"-arch=sm_{capability}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "cubin"]
    log = subprocess.run([NVCC, *options, source], capture_output=True, text=True, check=True).stderr
    # A stack frame without spills is an array that is indexed by what only the GPU knows, and not in registers.
    spilled = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    pattern = rf"Compiling entry function '(\w+)'.*?{spilled}.*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?"
    found = re.findall(pattern, log, re.S)
    names = [name for header in host.included(source) for name in host.kernels(header)]
    assert found
    for name in names:
        mine = [entry for entry in found if name in entry[0]]
        assert mine, f"{source.name} compiles no instance of {name}"
        for symbol, *spilled_bytes, registers, shared in mine:
            spills = sum(map(int, spilled_bytes))
            assert spills == 0, symbol
            tiles = re.search(r"SymmetricTilesI(\w)Li(\d+)ELi(\d+)E", symbol)
            element = tiles or re.search(rf"{name}I(\w)", symbol)
            arguments = {"f": "T=float", "d": "T=double"}.get(element[1], symbol) if element else symbol
            if groups := re.search(r"E?Li(\d+)EEEv", symbol) if "eliminate" in name else None:
                arguments += f" group={groups[1]}"
            occupancy = {}
            if tiles:
                grid = int(tiles[2])
                arguments += f" grid={grid} tile={tiles[3]}"
                occupancy["warps_per_multiprocessor"] = resident_warps(grid * (grid + 1) // 2, int(registers))
            record_table(
                TABLE,
                kernel=name,
                target=f"sm_{capability}",
                arguments=arguments,
                shared=int(shared or 0),
                registers=int(registers),
                spills=spills,
                **occupancy,
            )


def resident_warps(threads, registers):
    """Of kernels on SymmetricTiles, as far as 65,536 registers and 64 warps go."""
    warps = -(-threads // 32)
    warps *= 4 if warps == 1 else 1
    each = 32 * (-(-registers // 8) * 8) * warps
    return min(65536 // each * warps, 64 // warps * warps)


@pytest.mark.parametrize("file", sorted(KERNELS.glob("*.py")), ids=lambda file: file.name)
def test_masked_loads_say_what_is_beyond(file):
    """tl.load with mask= and without other= reads garbage on a GPU, and zeros in the interpreter."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            given = {keyword.arg for keyword in node.keywords}
            masked = "mask" in given or len(node.args) > 1
            assert not masked or "other" in given or len(node.args) > 2, f"{file.name}:{node.lineno}"


@pytest.mark.parametrize("name", OPS)
def test_every_kernel_named_has_a_launcher_and_says_what_it_supports(name):
    for impl in OPS[name].kernels:
        module = OPS[name].module(impl)
        assert callable(getattr(module, name))
        assert callable(getattr(module, f"supports_{name}"))
