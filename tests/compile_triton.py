"""Compiles every Triton kernel for a GPU that is not there: `python compile_triton.py 90` prints ptxas' words as JSON.

A process of its own, because Triton compiles for one driver and either compiles or interprets. The launchers run on the
cases of `fishleg-ext check`, on CPU tensors, with launches replaced by compilation: what is compiled is what they
launch, with the dtypes, constants and alignments of real calls, and all configurations where a kernel is tuned.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from fishleg_ext import kernels
from fishleg_ext.ops.dispatch import OPS
from fishleg_ext.testing import cases, check


class NoDevice(DriverBase):
    """Names a GPU to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def ptxas(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spills."""
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"-arch={target}", source, "-o", Path(folder, "cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {"registers": int(re.search(r"Used (\d+) registers", log)[1]), "spills": int(spills[1]) + int(spills[2])}


def main(capability: int) -> None:
    driver.set_active(NoDevice(GPUTarget("cuda", capability, 32)))
    kernels.INTERPRETED = True  # kernels take CPU tensors, as when they are interpreted
    compiled = {}  # by the compiler's hash
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = self.__name__, kernel

    def compile_all(self: Autotuner, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        for config in self.configs:
            compile_only(self.fn, *args, grid=grid, warmup=True, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_all
    for op in OPS.values():
        for dtype in check.DTYPES if "triton" in op.kernels else ():
            for case in cases.CASES[op.name](cases.Inputs(dtype, torch.device("cpu"), 0)):
                if op.supports("triton", *case.args, **case.kwargs)[0]:
                    op.launcher("triton")(*case.args, **case.kwargs)
    rows = [
        {"kernel": name, "arguments": arguments(kernel), "shared": kernel.metadata.shared}
        | ptxas(kernel.asm["ptx"], capability)
        for name, kernel in compiled.values()
    ]
    json.dump({"triton": triton.__version__, "rows": rows}, sys.stdout)


def arguments(kernel: Any) -> str:
    """Types and constants: table_ptr=*i64 BLOCK=4096."""
    source = kernel.src
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    return " ".join(f"{name}={constants.get(name, kind)}" for name, kind in source.signature.items())


if __name__ == "__main__":
    main(int(sys.argv[1]))
