"""Builds the CUDA part with CMake and Ninja where a CUDA toolkit is found, else installs pure Python.

FISHLEG_EXT_CUDA=1 insists on the CUDA part, FISHLEG_EXT_CUDA=0 leaves it out. What was decided and why
is written to `fishleg_ext/build_record.json`, because pip hides a build's output; `fishleg-ext info` shows it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
ARCHITECTURES = os.environ.get("FISHLEG_EXT_CUDA_ARCHITECTURES", "80;90")


def find_nvcc() -> str | None:
    """The path of nvcc: $CUDACXX, $CUDA_HOME/bin, PATH, /usr/local/cuda/bin, in this order."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), homes[0] and f"{homes[0]}/bin/nvcc", shutil.which("nvcc")]
    candidates.append(f"{homes[1]}/bin/nvcc")
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


def decide() -> dict:
    """Whether to build the CUDA part, and the reason."""
    wish = os.environ.get("FISHLEG_EXT_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        sys.exit(f"FISHLEG_EXT_CUDA: expected 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return {"cuda": False, "reason": "FISHLEG_EXT_CUDA=0 was set when this was installed"}
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "no CUDA toolkit was found at install time (nvcc on PATH, $CUDA_HOME or $CUDACXX)"
        if wish == "1":
            sys.exit(f"FISHLEG_EXT_CUDA=1, but {reason}")
        return {"cuda": False, "reason": reason}
    return {"cuda": True, "reason": f"built with {nvcc}", "nvcc": nvcc, "required": wish == "1"}


class CMakeBuild(build_ext):
    """Runs CMake and lets it place the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.run_cmake(target)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            if BUILD["required"]:
                raise
            remove_stale_modules()
            write_record({"cuda": False, "reason": f"the CUDA build failed: {error}"}, self)

    def run_cmake(self, target: Path) -> None:
        import pybind11

        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_COMPILER={BUILD['nvcc']}",
            f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFISHLEG_EXT_OUTPUT={target}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(work)], check=True)

    def get_source_files(self) -> list[str]:
        return ["CMakeLists.txt", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*"))]


class RecordedBuild(build_py):
    """build_py that also carries the record into a wheel."""

    def run(self) -> None:
        write_record({k: v for k, v in BUILD.items() if k in ("cuda", "reason")})
        super().run()


def write_record(record: dict, command: build_ext | None = None) -> None:
    """Writes the record into the source tree and, for a wheel under construction, into the wheel."""
    folders = [ROOT / "fishleg_ext"]
    if command is not None and not command.inplace:
        folders.append(Path(command.build_lib) / "fishleg_ext")
    for folder in folders:
        (folder / "build_record.json").write_text(json.dumps(record) + "\n")


def remove_stale_modules() -> None:
    """A module left by an earlier build must not outlive the decision to do without it."""
    for stale in ROOT.glob("fishleg_ext/_build*.so"):
        stale.unlink()


class BinaryDistribution(Distribution):
    """A wheel is platform specific exactly when it holds the module."""

    def has_ext_modules(self) -> bool:
        return BUILD["cuda"]


BUILD = decide()
if not BUILD["cuda"]:
    remove_stale_modules()

setup(
    ext_modules=[Extension("fishleg_ext._build", sources=[])] if BUILD["cuda"] else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": RecordedBuild},
    distclass=BinaryDistribution,
)
