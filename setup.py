"""Builds the CUDA part with CMake and Ninja where a CUDA toolkit is found, else installs pure Python.

FISHLEG_EXT_CUDA=1 insists on the CUDA part, FISHLEG_EXT_CUDA=0 leaves it out. What was decided, and why, is written to
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
LIBRARIES = ("_build", "_C")  # CMake's targets, each a file in the package


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


def decide() -> tuple[dict, str | None]:
    """What to record, and why there can be no CUDA part, or None if there can."""
    wish = os.environ.get("FISHLEG_EXT_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"FISHLEG_EXT_CUDA: expected 0, 1 or auto, got {wish!r}")
    nvcc, obstacle = find_nvcc(), None
    if wish == "0":
        obstacle = "FISHLEG_EXT_CUDA=0 was set at install time"
    elif nvcc is None:
        obstacle = "no CUDA toolkit was found at install time (no nvcc in $CUDACXX, $CUDA_HOME or PATH)"
    elif find_torch() is None:
        obstacle = "no torch >= 2.10 was found at install time: install torch first, then this package again"
    elif find_pybind11() is None:
        obstacle = "no pybind11 was found at install time"
    if obstacle and wish == "1":
        sys.exit(f"FISHLEG_EXT_CUDA=1, but {obstacle}")
    return {"cuda": obstacle is None, "reason": obstacle or f"built with {nvcc}"}, obstacle


class CMakeBuild(build_ext):
    """Runs CMake, which places the libraries where setuptools looks for them."""

    def build_extensions(self) -> None:
        work = Path(self.build_temp).resolve()
        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": find_nvcc(),
            "CMAKE_CUDA_ARCHITECTURES": ARCHITECTURES,
            "Python_EXECUTABLE": sys.executable,
            # For developers; what a later compiler warns of is no reason to leave users without kernels.
            "CMAKE_COMPILE_WARNING_AS_ERROR": "ON" if os.environ.get("FISHLEG_EXT_WERROR") == "1" else "OFF",
            "FISHLEG_EXT_PYBIND11": find_pybind11(),
            "FISHLEG_EXT_TORCH": find_torch(),
        }
        for ext in self.extensions:
            name = ext.name.rpartition(".")[2]
            variables[f"FISHLEG_EXT_OUTPUT{name}"] = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = ["cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in variables.items()]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work)], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            if os.environ.get("FISHLEG_EXT_CUDA") == "1":
                raise
            install_pure(f"the CUDA build failed at install time: {error}", Path(self.build_lib))

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def install_pure(reason: str, build_lib: Path | None = None) -> None:
    """Record why there is no CUDA part; no library of an earlier build may outlive that."""
    for library in LIBRARIES:
        for stale in PACKAGE.glob(f"{library}*.so"):
            stale.unlink()
    for folder in (PACKAGE, build_lib and build_lib / "fishleg_ext"):
        if folder and folder.is_dir():
            record(folder, {"cuda": False, "reason": reason})


def record(folder: Path, content: dict) -> None:
    (folder / "build_record.json").write_text(json.dumps(content) + "\n")


decision, obstacle = decide()
record(PACKAGE, decision)
if obstacle:
    install_pure(obstacle)
setup(
    packages=[
        *find_packages(include=["fishleg_ext*"]),
        *MAPPED,
        *(f"{name}.{inner}" for name, folder in MAPPED.items() for inner in find_packages(folder)),
    ],
    package_dir=MAPPED,
    # Optional: where the build fails, the installation goes on without them.
    ext_modules=[Extension(f"fishleg_ext.{name}", sources=[], optional=True) for name in LIBRARIES if not obstacle],
    cmdclass={"build_ext": CMakeBuild},
)
