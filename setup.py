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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "fishleg_ext"
ARCHITECTURES = os.environ.get("FISHLEG_EXT_CUDA_ARCHITECTURES", "80;90")


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


def find_pybind11() -> Path | None:
    """The folder of pybind11's headers: the package's own, or those that torch carries."""
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        if spec and spec.origin and (include := Path(spec.origin).parent / "include").is_dir():
            return include
    return None


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
    elif find_pybind11() is None:
        obstacle = "no pybind11 was found at install time"
    if obstacle and wish == "1":
        sys.exit(f"FISHLEG_EXT_CUDA=1, but {obstacle}")
    return {"cuda": obstacle is None, "reason": obstacle or f"built with {nvcc}"}, obstacle


class CMakeBuild(build_ext):
    """Runs CMake, which places the module where setuptools looks for it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve()
        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": find_nvcc(),
            "CMAKE_CUDA_ARCHITECTURES": ARCHITECTURES,
            "Python_EXECUTABLE": sys.executable,
            "FISHLEG_EXT_PYBIND11": find_pybind11(),
            "FISHLEG_EXT_OUTPUT": target,
        }
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
    """Record why there is no CUDA part; no module of an earlier build may outlive that."""
    for stale in PACKAGE.glob("_build*.so"):
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
    # Optional: where the build fails, the installation goes on without the module.
    ext_modules=[] if obstacle else [Extension("fishleg_ext._build", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
