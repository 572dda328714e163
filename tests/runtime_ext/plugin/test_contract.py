"""What the plugin relies on in SGLang: found in its source, and in what Python makes of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preble_sgl.runtime_ext.environment import child_environment
from preble_sgl.runtime_ext.plugin.contract import NEEDS, ORDER, STATE, broken_features

RESOLVE = """
import inspect, json, pkgutil, sys
for path, wanted in json.loads(sys.argv[1]):
    owner, _, name = path.rpartition(".")
    found = inspect.getattr_static(pkgutil.resolve_name(owner), name)
    found = getattr(found, "__func__", found)
    parameters = list(inspect.signature(found).parameters.values())
    assert [p.name for p in parameters[:len(wanted)]] == wanted, (path, parameters)
    assert all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
               for p in parameters[len(wanted):]), (path, parameters)
print("all fit")
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files of SGLang that the contract is about."""
    from preble_sgl.runtime_ext.plugin import contract

    installed = contract._installed()
    if installed is None:
        pytest.skip("sglang is not installed")
    for target in {target for targets in NEEDS.values() for target in targets}:
        file = Path(*target.module.split(".")[1:]).with_suffix(".py")
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed / file, tmp_path / file)
    return tmp_path


def change(source: Path, module: str, old: str, new: str) -> None:
    file = source.joinpath(*module.split(".")[1:]).with_suffix(".py")
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_installed_sglang_fits(source: Path) -> None:
    assert broken_features(source) == {}


def test_a_new_parameter_with_a_default_does_no_harm(source: Path) -> None:
    change(source, ORDER.module, "processed_tokens: int = 0,", "processed_tokens: int = 0, more: int = 1,")
    assert broken_features(source) == {}


def test_a_target_that_takes_something_else_breaks_its_feature_alone(source: Path) -> None:
    change(source, ORDER.module, "waiting_queue: List[Req],", "queue: List[Req],")
    (problem,) = broken_features(source).items()
    assert problem == (
        "order",
        "sglang.srt.managers.schedule_policy.SchedulePolicy.calc_priority takes "
        "(self, queue, running_batch, processed_tokens), not (self, waiting_queue)",
    )


def test_a_target_that_wants_more_breaks_its_feature(source: Path) -> None:
    old = "running_batch: Optional[ScheduleBatch] = None,\n        processed_tokens: int = 0,"
    change(source, ORDER.module, old, "running_batch, processed_tokens: int = 0,")
    assert list(broken_features(source)) == ["order"]


def test_without_a_way_to_say_that_it_runs_the_plugin_does_nothing(source: Path) -> None:
    change(source, STATE.module, "def get_internal_state(", "def get_inner_state(")
    broken = broken_features(source)
    assert broken.keys() == NEEDS.keys()
    assert broken["pins"] == "sglang.srt.managers.scheduler.Scheduler.get_internal_state is gone"


def test_a_file_that_is_gone_is_told(source: Path) -> None:
    shutil.rmtree(source / "srt" / "mem_cache" / "rust_tree_core")
    broken = broken_features(source)
    assert list(broken) == ["pins"]
    assert broken["pins"].count("is gone") == 3


@pytest.mark.sglang
def test_every_target_resolves_in_the_running_sglang_with_the_signature_read_from_its_source() -> None:
    targets = {target for targets in NEEDS.values() for target in targets}
    wanted = [(target.path, [name for name in target.parameters if name != "cls"]) for target in targets]
    wanted = [
        (path, ["cls", *names]) if path.endswith("HookRegistry.register") else (path, names)
        for path, names in wanted
    ]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RESOLVE, json.dumps(wanted)],
        capture_output=True,
        text=True,
        env=child_environment(()),
    )
    assert answer.stdout.splitlines()[-1:] == ["all fit"], answer.stderr[-2000:]
