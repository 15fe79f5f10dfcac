"""What setup.py decides, and what it records."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import importlib.util, json, os, runpy, shutil, setuptools, sysconfig
if "NO_EXECUTABLE" in os.environ:
    os.access = lambda *arguments: False
    shutil.which = lambda *arguments: None
if "NO_TORCH" in os.environ:
    importlib.util.find_spec = lambda name: None
    sysconfig.get_path = lambda name: "/nowhere"
setuptools.setup = lambda **options: print(json.dumps([e.name for e in options["ext_modules"]]))
runpy.run_path("setup.py")
"""


def decide(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py in a copy of what it reads, with setuptools.setup replaced."""
    (folder / "fishleg_ext").mkdir(exist_ok=True)
    (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FISHLEG_EXT", "CUDA"))}
    return subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=folder,
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def recorded(folder: Path) -> dict:
    return json.loads((folder / "fishleg_ext" / "build_record.json").read_text())


def test_without_either_on_request(tmp_path):
    (tmp_path / "fishleg_ext").mkdir()
    names = ("_build", "_C", "_cpu")
    stale = [tmp_path / "fishleg_ext" / f"{name}.cpython-311-x86_64-linux-gnu.so" for name in names]
    for library in stale:
        library.write_text("from an earlier build")
    done = decide(tmp_path, FISHLEG_EXT_CUDA="0", FISHLEG_EXT_CPU="0")
    assert json.loads(done.stdout) == []
    assert recorded(tmp_path) == {
        part: {"built": False, "reason": f"FISHLEG_EXT_{part.upper()}=0 was set at install time"}
        for part in ("cpu", "cuda")
    }
    assert not any(library.exists() for library in stale)


@pytest.fixture
def nvcc(tmp_path):
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_with_a_toolkit_all_libraries_are_built(tmp_path, nvcc):
    done = decide(tmp_path, CUDACXX=str(nvcc))
    assert json.loads(done.stdout) == ["fishleg_ext._cpu", "fishleg_ext._build", "fishleg_ext._C"]
    assert recorded(tmp_path)["cuda"] == {"built": True, "reason": f"built with {nvcc}"}


def test_with_a_compiler_alone_the_cpu_kernels_are_built(tmp_path, nvcc):
    done = decide(tmp_path, CUDACXX=str(nvcc), CXX="c++", FISHLEG_EXT_CUDA="0")
    assert json.loads(done.stdout) == ["fishleg_ext._cpu"]
    assert recorded(tmp_path)["cpu"] == {"built": True, "reason": "built with c++"}


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_without_torch_the_reason_says_what_to_do(tmp_path, nvcc, part):
    done = decide(tmp_path, CUDACXX=str(nvcc), NO_TORCH="1")
    assert json.loads(done.stdout) == []
    assert "install torch first, then this package again" in recorded(tmp_path)[part]["reason"]


@pytest.mark.parametrize("wish", ["auto", "1"])
@pytest.mark.parametrize("part, missing", [("cpu", "no C++ compiler"), ("cuda", "no CUDA toolkit")])
def test_without_a_compiler_pure_python_unless_insisted(tmp_path, part, missing, wish):
    done = decide(tmp_path, **{f"FISHLEG_EXT_{part.upper()}": wish}, NO_EXECUTABLE="1")
    if wish == "1":
        assert done.returncode != 0
        assert f"FISHLEG_EXT_{part.upper()}=1, but {missing} was found" in done.stderr
    else:
        assert json.loads(done.stdout) == []
        assert f"{missing} was found at install time" in recorded(tmp_path)[part]["reason"]


@pytest.mark.parametrize("variable", ["FISHLEG_EXT_CPU", "FISHLEG_EXT_CUDA"])
def test_an_unknown_wish_is_refused(tmp_path, variable):
    done = decide(tmp_path, **{variable: "yes"})
    assert done.returncode != 0
    assert f"{variable}: expected 0, 1 or auto, got 'yes'" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_cpu_kernels_are_built_without_cuda(tmp_path):
    """From a copy of the project; and a build that fails leaves a package without them, and says why."""
    for folder in ("fishleg_ext", "csrc", "kernels", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    variables = os.environ | {"FISHLEG_EXT_CUDA": "0", "FISHLEG_EXT_CPU": "auto"}
    tools = Path(sys.executable).parent
    if not (tools / "cmake").exists() and shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = lambda: subprocess.run(build, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    run()
    assert len(list((tmp_path / "fishleg_ext").glob("_cpu*.so"))) == 1
    assert not list((tmp_path / "fishleg_ext").glob("_C*.so"))
    (tmp_path / "csrc" / "cpu_obs.h").write_text("#error on purpose")
    run()
    assert not list((tmp_path / "fishleg_ext").glob("_cpu*.so"))
    assert "its build failed at install time" in recorded(tmp_path)["cpu"]["reason"]
