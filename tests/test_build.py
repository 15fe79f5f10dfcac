"""What setup.py decides, and what it records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROBE = """
import importlib.util, json, os, runpy, setuptools, sysconfig
if "NO_EXECUTABLE" in os.environ:
    os.access = lambda *arguments: False
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


def test_without_cuda_on_request(tmp_path):
    (tmp_path / "fishleg_ext").mkdir()
    stale = [tmp_path / "fishleg_ext" / f"{name}.cpython-311-x86_64-linux-gnu.so" for name in ("_build", "_C")]
    for library in stale:
        library.write_text("from an earlier build")
    done = decide(tmp_path, FISHLEG_EXT_CUDA="0")
    assert json.loads(done.stdout) == []
    assert recorded(tmp_path) == {"cuda": False, "reason": "FISHLEG_EXT_CUDA=0 was set at install time"}
    assert not any(library.exists() for library in stale)


@pytest.fixture
def nvcc(tmp_path):
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_with_a_toolkit_the_libraries_are_built(tmp_path, nvcc):
    done = decide(tmp_path, CUDACXX=str(nvcc))
    assert json.loads(done.stdout) == ["fishleg_ext._build", "fishleg_ext._C"]
    assert recorded(tmp_path) == {"cuda": True, "reason": f"built with {nvcc}"}


def test_without_torch_the_reason_says_what_to_do(tmp_path, nvcc):
    done = decide(tmp_path, CUDACXX=str(nvcc), NO_TORCH="1")
    assert json.loads(done.stdout) == []
    assert "install torch first, then this package again" in recorded(tmp_path)["reason"]


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_without_a_toolkit_pure_python_unless_insisted(tmp_path, wish):
    done = decide(tmp_path, FISHLEG_EXT_CUDA=wish, NO_EXECUTABLE="1")
    if wish == "1":
        assert done.returncode != 0
        assert "FISHLEG_EXT_CUDA=1, but no CUDA toolkit was found" in done.stderr
    else:
        assert json.loads(done.stdout) == []
        assert "no CUDA toolkit was found at install time" in recorded(tmp_path)["reason"]


def test_an_unknown_wish_is_refused(tmp_path):
    done = decide(tmp_path, FISHLEG_EXT_CUDA="yes")
    assert done.returncode != 0
    assert "expected 0, 1 or auto, got 'yes'" in done.stderr
