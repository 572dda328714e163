"""What the machine is said to have."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from preble_sgl.runtime_ext import environment
from preble_sgl.runtime_ext.environment import child_environment, missing_requirements, remedy

HEAVY = {"torch", "sglang", "transformers", "numpy", "safetensors"}


def test_a_child_on_the_cpu_finds_the_stand_ins_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    child = child_environment(())
    assert child["PYTHONPATH"] == f"{environment.CPU_STUBS}{os.pathsep}/mine"
    assert (child["SGLANG_USE_CPU_ENGINE"], child["OMP_NUM_THREADS"], child["HOME"]) == (
        "1",
        "1",
        os.environ["HOME"],
    )


def test_a_child_on_a_gpu_sees_that_one_and_no_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    child = child_environment((3,))
    assert child["CUDA_VISIBLE_DEVICES"] == "3"
    assert "PYTHONPATH" not in child


def test_what_is_missing_is_named_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "4.0", "sglang": "0.5.23"}

    def version(package: str) -> str:
        if package == "xgrammar":
            raise metadata.PackageNotFoundError(package)
        return versions.get(package, "1.0")

    requires = [
        "rich>=13",
        "torch==2.13.0; extra == 'cpu'",
        "transformers==5.19.0; extra == 'cpu'",
        "x; extra == 'dev'",
    ]
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda package: requires)
    missing = missing_requirements(gpu=False)
    assert [one.problem for one in missing] == [
        "transformers is 4.0 (needed: transformers==5.19.0)",
        "xgrammar is not installed (needed: xgrammar==0.2.7)",
    ]
    assert str(missing[0]).endswith("; run: pip install 'preble-sgl[cpu]'")
    assert remedy(missing) == (
        f"pip install 'preble-sgl[cpu]' && pip install --no-deps -r {environment.CPU_NO_DEPS}"
    )


def test_talking_to_runtimes_imports_nothing_heavy() -> None:
    imports = "import sys, preble_sgl.runtime_ext.launcher; print(*sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", imports], text=True)
    assert not HEAVY & set(printed.split())
