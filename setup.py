"""Builds the CPU kernels where there is a C++ compiler, and the CUDA part where there is a toolkit, by CMake and Ninja.

FISHLEG_EXT_CUDA=1 insists on the CUDA part, FISHLEG_EXT_CUDA=0 leaves it out; so does FISHLEG_EXT_CPU with the CPU
kernels. Without either the package is pure Python. What was decided, and why, is written to
fishleg_ext/build_record.json, because pip hides a build's output; `fishleg-ext info` shows it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "fishleg_ext"
ARCHITECTURES = os.environ.get("FISHLEG_EXT_CUDA_ARCHITECTURES", "80;90")
MAPPED = {"fishleg_ext.kernels": "kernels", "fishleg_ext.bench": "bench"}  # packages of folders beside the package
LIBRARIES = {"cpu": ("_cpu",), "cuda": ("_build", "_C")}  # part -> CMake's targets, each a file in the package


def find_nvcc() -> str | None:
    """The path of nvcc, from $CUDACXX, $CUDA_HOME, PATH or its usual place."""
    home = os.environ.get("CUDA_HOME")
    usual = "/usr/local/cuda/bin/nvcc"
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        usual,
    ]
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def find_package(name: str) -> Path | None:
    """The folder of an installed package; an isolated build sees no other packages, but knows where they are."""
    spec = importlib.util.find_spec(name)
    folder = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("platlib")) / name
    return folder if folder.is_dir() else None


def find_pybind11() -> Path | None:
    """The folder of pybind11's headers: the package's own, or those that torch carries."""
    folders = (find_package(name) for name in ("pybind11", "torch"))
    return next((f / "include" for f in folders if f and (f / "include" / "pybind11").is_dir()), None)


def find_torch() -> Path | None:
    """The folder of a torch that has the stable ABI of 2.10."""
    folder = find_package("torch")
    return folder if folder and (folder / "include/torch/csrc/stable/accelerator.h").is_file() else None


def find_compiler() -> str | None:
    """A C++ compiler, from $CXX or PATH."""
    return next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c.split()[0])), None)


def obstacle_to(part: str) -> str | None:
    """Why a part cannot be built, or None if it can."""
    if part == "cuda" and find_nvcc() is None:
        return "no CUDA toolkit was found at install time (no nvcc in $CUDACXX, $CUDA_HOME or PATH)"
    if find_compiler() is None:
        return "no C++ compiler was found at install time (none in $CXX or PATH)"
    if find_torch() is None:
        return "no torch >= 2.10 was found at install time: install torch first, then this package again"
    if part == "cuda" and find_pybind11() is None:
        return "no pybind11 was found at install time"
    return None


def decide(part: str) -> dict:
    """Whether a part is to be built, and why, or why not."""
    variable = f"FISHLEG_EXT_{part.upper()}"
    wish = os.environ.get(variable, "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"{variable}: expected 0, 1 or auto, got {wish!r}")
    obstacle = f"{variable}=0 was set at install time" if wish == "0" else obstacle_to(part)
    if obstacle and wish == "1":
        sys.exit(f"{variable}=1, but {obstacle}")
    return {"built": obstacle is None, "reason": obstacle or f"built with {BUILT_WITH[part]()}"}


BUILT_WITH = {"cpu": find_compiler, "cuda": find_nvcc}


class CMakeBuild(build_ext):
    """Runs CMake, which places the libraries where setuptools looks for them."""

    def build_extensions(self) -> None:
        wanted, left_out = dict(decisions), iter(("cuda", "cpu"))
        while parts := [part for part, decision in wanted.items() if decision["built"]]:
            try:
                self.run_cmake(parts)
                break
            except (subprocess.CalledProcessError, OSError) as error:
                if any(os.environ.get(f"FISHLEG_EXT_{part.upper()}") == "1" for part in parts):
                    raise
                part = next(part for part in left_out if part in parts)
                wanted[part] = {"built": False, "reason": f"its build failed at install time: {error}"}
        record(wanted, Path(self.build_lib) / "fishleg_ext")

    def run_cmake(self, parts: list[str]) -> None:
        work = Path(self.build_temp).resolve() / "-".join(parts)
        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            # For developers; what a later compiler warns of is no reason to leave users without kernels.
            "CMAKE_COMPILE_WARNING_AS_ERROR": "ON" if os.environ.get("FISHLEG_EXT_WERROR") == "1" else "OFF",
            "FISHLEG_EXT_CPU": "ON" if "cpu" in parts else "OFF",
            "FISHLEG_EXT_CUDA": "ON" if "cuda" in parts else "OFF",
            "FISHLEG_EXT_TORCH": find_torch(),
        }
        if "cuda" in parts:
            variables |= {"CMAKE_CUDA_COMPILER": find_nvcc(), "CMAKE_CUDA_ARCHITECTURES": ARCHITECTURES}
            variables["FISHLEG_EXT_PYBIND11"] = find_pybind11()
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            variables[f"FISHLEG_EXT_OUTPUT{name}"] = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja"]
        subprocess.run(configure + [f"-D{name}={value}" for name, value in variables.items()], check=True)
        subprocess.run(["cmake", "--build", str(work)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def record(parts: dict[str, dict], folder: Path | None = None) -> None:
    """Write down what was decided; no library of an earlier build may outlive that."""
    for place in (PACKAGE, folder):
        if not (place and place.is_dir()):
            continue
        for part, decision in parts.items():
            for library in () if decision["built"] else LIBRARIES[part]:
                for stale in place.glob(f"{library}*.so"):
                    stale.unlink()
        (place / "build_record.json").write_text(json.dumps(parts) + "\n")


decisions = {part: decide(part) for part in LIBRARIES}
record(decisions)
setup(
    packages=[
        *find_packages(include=["fishleg_ext*"]),
        *MAPPED,
        *(f"{name}.{inner}" for name, folder in MAPPED.items() for inner in find_packages(folder)),
    ],
    package_dir=MAPPED,
    # Optional: where the build fails, the installation goes on without them.
    ext_modules=[
        Extension(f"fishleg_ext.{name}", sources=[], optional=True)
        for part, names in LIBRARIES.items()
        for name in names
        if decisions[part]["built"]
    ],
    cmdclass={"build_ext": CMakeBuild},
)
