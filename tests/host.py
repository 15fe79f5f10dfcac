"""Builds csrc/ kernels for the host (tests/cuda_on_host/) and runs them in the place of a private op."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
HOST = ROOT / "tests" / "cuda_on_host"
PROGRAMS = ROOT / ".pytest_cache" / "cuda_on_host"
KEPT_SECONDS = 7 * 24 * 3600
BARRIER = re.compile(r"__sync(threads|warp)\([^)]*\);")
SELFTEST = HOST / "selftest.cpp"
DRIVERS = sorted(set(HOST.glob("*.cpp")) - {SELFTEST})  # each named after the private op that launches its kernel


@dataclass(frozen=True)
class Barrier:
    """One barrier of a kernel."""

    file: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line} {self.name}"

    def kernel(self) -> str | None:
        """The __global__ function that it is in; None where it is in what several use."""
        lines = self.file.read_text().splitlines(keepends=True)
        before = "".join(lines[: self.line])
        name = (kernels_in(before) or [None])[-1]
        ended = name is not None and re.search(r"^}", before.rpartition(name)[2], re.M)
        return None if ended else name

    def deleted(self) -> str:
        """The file's text without it."""
        lines = self.file.read_text().splitlines(keepends=True)
        lines[self.line - 1] = BARRIER.sub("{}", lines[self.line - 1], count=1)
        return "".join(lines)


def barriers(file: Path) -> list[Barrier]:
    found = enumerate(map(BARRIER.search, file.read_text().splitlines()), start=1)
    return [Barrier(file, line, match[0]) for line, match in found if match]


def kernels(file: Path) -> list[str]:
    """Names of the __global__ functions in a file."""
    return kernels_in(file.read_text())


def kernels_in(text: str) -> list[str]:
    return re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\s*\(", text)


def included(file: Path) -> list[Path]:
    """The headers of csrc/ that a file includes, itself or through others."""
    found = [CSRC / name for name in re.findall(r'#include "(\w+\.cuh)"', file.read_text())]
    own = [HOST / name for name in re.findall(r'#include "(\w+\.h)"', file.read_text()) if (HOST / name).exists()]
    return list(dict.fromkeys(found + [header for each in found + own for header in included(each)]))


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build(driver: Path, *, sanitize: str, csrc: Path = CSRC) -> Path:
    """Compile a driver with the kernels of folder `csrc`, unless the same was compiled before.

    Programs are kept by the hash of all that they are made from, for all workers and later runs; for a week.
    """
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-fsanitize={sanitize}"]
    includes = [f"-I{folder}" for folder in (HOST, csrc, CSRC)]
    command = ["g++", *flags, "-fno-sanitize-recover=undefined", *includes, str(driver)]
    content = hashlib.sha256(" ".join(flags).encode() + _gxx_version())
    for file in [driver, *sorted(csrc.glob("*.*h")), *sorted(HOST.glob("*.*h"))]:
        content.update(file.name.encode() + file.read_bytes())
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    target = PROGRAMS / f"{driver.stem}-{content.hexdigest()[:20]}"
    with (PROGRAMS / f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            partial.rename(target)
            _forget_old_programs()
    target.touch()
    return target


@functools.cache
def _gxx_version() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout


def _forget_old_programs() -> None:
    for program in PROGRAMS.iterdir():
        if time.time() - program.stat().st_mtime > KEPT_SECONDS:
            program.unlink(missing_ok=True)


def execute(*command: Any) -> subprocess.CompletedProcess[str]:
    """Run what `build` has made."""
    # ThreadSanitizer would wait for a second before it ends, for races that threads still running might yet have.
    environment = os.environ | {"TSAN_OPTIONS": "atexit_sleep_ms=0"}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)


def why_not() -> str | None:
    """Why nothing can be run on the host here, or None if it can."""
    from fishleg_ext import cuda

    if shutil.which("g++") is None:
        return "running CUDA kernels on the host needs g++"
    return cuda.not_loaded()


@contextlib.contextmanager
def on_host(name: str, executable: Path, folder: Path) -> Iterator[list[str]]:
    """In this block private op `name` on CPU tensors runs `executable`; yields what each call printed to stderr."""
    assert hasattr(torch.ops.fishleg_ext_cuda, name), f"no private op {name}: is the CUDA part built anew?"
    overload = getattr(torch.ops.fishleg_ext_cuda, name).default
    arguments = overload._schema.arguments
    printed: list[str] = []

    def run(*values: Any) -> None:
        (folder / "in").write_bytes(b"".join(map(_serialised, values)))
        done = execute(executable, folder / "in", folder / "out")
        printed.append(done.stderr)
        if done.returncode:
            raise RuntimeError(f"{executable.name} ended with status {done.returncode}:\n{done.stderr[:3000]}")
        result = (folder / "out").read_bytes()
        for argument, value in zip(arguments, values, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, list) else [value]:
                    assert tensor.is_contiguous()
                    size = tensor.numel() * tensor.element_size()
                    tensor.copy_(torch.frombuffer(bytearray(result[:size]), dtype=tensor.dtype).view(tensor.shape))
                    result = result[size:]
        assert not result

    library = torch.library.Library("fishleg_ext_cuda", "IMPL")
    library.impl(name, run, "CPU")
    try:
        yield printed
    finally:
        library._destroy()


def _serialised(value: Any) -> bytes:
    """As `Arguments` of cuda_on_host/arguments.h reads it."""
    if isinstance(value, list):
        return struct.pack("<q", len(value)) + b"".join(map(_serialised, value))
    if isinstance(value, torch.Tensor):
        places = zip(value.shape, value.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in places) if value.numel() else 0
        kind = {torch.float16: 1, torch.bfloat16: 2}.get(value.dtype, 0)
        header = [value.element_size(), kind, value.dim(), *value.shape, *value.stride(), span]
        elements = value.as_strided((span,), (1,)).view(torch.uint8).numpy().tobytes()
        return struct.pack(f"<{len(header)}q", *header) + elements
    return struct.pack("<d" if isinstance(value, float) else "<q", value)
