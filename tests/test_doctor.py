"""What the doctor finds, and what it says to do."""

import sys
from pathlib import Path

import pytest

from preble_sgl import cli
from preble_sgl.commands import doctor
from preble_sgl.commands.doctor import examine, try_one_token
from preble_sgl.runtime_ext.environment import Missing, missing_requirements
from preble_sgl.runtime_ext.gpus import Gpu


def test_what_this_machine_has_is_told_and_what_works() -> None:
    if missing_requirements(gpu=False):
        pytest.skip("SGLang is not installed here")
    report = examine()
    assert report.healthy
    assert [line for line in report.text.splitlines() if not line.startswith(" ")] == [
        "machine",
        "packages",
        "plugin",
        "ports and memory",
    ]
    assert "✓ works inside this SGLang: marker, order, events, pins, load" in report.text
    assert "✗" not in report.text


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(0, "NVIDIA H100", "GPU-1", 80 * 2**30, 60 * 2**30)
    monkeypatch.setattr(doctor, "visible_gpus", lambda: (gpu,))
    monkeypatch.setattr(doctor, "driver_version", lambda: "570.1")
    text = examine().text
    assert "✓ NVIDIA driver 570.1" in text
    assert "✓ GPU 0: NVIDIA H100, 60 of 80 GiB free" in text


def test_each_problem_comes_with_what_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = (Missing("torch", "torch==1", None, "pip install torch==1"),)
    monkeypatch.setattr(doctor, "missing_requirements", lambda gpu: missing)
    monkeypatch.setattr(doctor, "broken_features", lambda: {"pins": "x.y is gone"})
    monkeypatch.setattr(doctor, "is_free", lambda port: False)
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY", 2**60)
    report = examine()
    assert not report.healthy
    for line in (
        "✗ torch is not installed (needed: torch==1)",
        "✗ run: pip install torch==1",
        "✗ pins does not work: x.y is gone",
        "✓ works inside this SGLang: marker, order, events, load",
        "✗ 0 of the 50 ports tried in 20000–32767 are free",
        ": enlarge it (docker run --shm-size=1g)",
    ):
        assert line in report.text


def test_a_fleet_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('[[attach]]\nurl = "http://127.0.0.1:1"\n')
    assert "✓ preble_e2 over 127.0.0.1:1" in examine(file).text
    file.write_text("[[runtime]]\ngpus = [0]\nmodel = 1\n")
    report = examine(file)
    assert not report.healthy
    assert f"✗ {file}: runtime.0.model: Extra inputs are not permitted" in report.text


async def test_a_runtime_that_cannot_start_is_a_finding(tmp_path: Path) -> None:
    report = await try_one_token(tmp_path / "none")
    assert not report.healthy
    assert "✗ no model at" in report.text


@pytest.mark.sglang
def test_one_token_is_generated(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["preble-sgl", "doctor", "--model-path", str(tiny_model)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr().out
    assert "✓ a runtime was ready after" in out
    assert out.endswith("ready: try `preble-sgl demo`\n")
    assert ended.value.code == 0
