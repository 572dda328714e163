"""What a fleet.toml may say, and one clear line for what it says wrong."""

from pathlib import Path

import pytest

from preble_sgl import fleet_file
from preble_sgl.errors import InputError
from preble_sgl.fleet_file import load_fleet
from preble_sgl.runtime_ext.launch_spec import LaunchSpec
from preble_sgl.runtime_ext.supervisor import AttachSpec

WHOLE = """
model_path = "models/llama"
policy = "preble_plan"

[runtimes]
kv_tokens = 100000
order = "preble_groups"
profile = "h100-llama3-8b"
env = { A = "1" }
extra_args = ["--log-level", "warning"]
log_dir = "logs"
[runtimes.sglang]
mem_fraction_static = 0.85
disable_radix_cache = true

[[runtime]]
gpus = [0]
[[runtime]]
name = "big"
gpus = [1, 2]
quantization = "fp8"
kv_tokens = 200000
port = 30000
profile = "a6000-mistral-7b"
plugin = false
env = { B = "2" }
sglang = { mem_fraction_static = 0.7 }
[[runtime]]
device = "cpu"
count = 2
order = "spf"
port = 31000

[[attach]]
url = "http://10.0.0.7:30000"
[[attach]]
url = "http://10.0.0.8:30000"
name = "eight"
api_key_env = "KEY"
profile = "a6000-mistral-7b"
"""


def write(path: Path, text: str) -> Path:
    file = path / "fleet.toml"
    file.write_text(text)
    return file


def test_a_fleet_of_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "secret")
    plan = load_fleet(write(tmp_path, WHOLE))
    common = {
        "model_path": tmp_path / "models/llama",
        "extra_args": ("--log-level", "warning"),
        "log_dir": tmp_path / "logs",
    }
    first, big, *cpus = plan.specs
    assert first == LaunchSpec(
        worker_id="gpu0",  # type: ignore[arg-type]
        gpus=(0,),
        kv_tokens=100_000,
        order="preble_groups",
        flags={"mem_fraction_static": 0.85, "disable_radix_cache": True},
        env={"A": "1"},
        **common,  # type: ignore[arg-type]
    )
    assert big == LaunchSpec(
        worker_id="big",  # type: ignore[arg-type]
        gpus=(1, 2),
        kv_tokens=200_000,
        order="preble_groups",
        plugin=False,
        port=30000,
        flags={"mem_fraction_static": 0.7, "disable_radix_cache": True, "quantization": "fp8"},
        env={"A": "1", "B": "2"},
        **common,  # type: ignore[arg-type]
    )
    assert [(one.worker_id, one.gpus, one.port, one.order) for one in cpus] == [
        ("cpu0", (), 31000, "spf"),
        ("cpu1", (), 31001, "spf"),
    ]
    assert plan.attach == (
        AttachSpec(url="http://10.0.0.7:30000"),
        AttachSpec(url="http://10.0.0.8:30000", worker_id="eight", api_key="secret"),  # type: ignore[arg-type]
    )
    assert plan.policy == "preble_plan"
    assert plan.profiles == {
        "gpu0": "h100-llama3-8b",
        "big": "a6000-mistral-7b",
        "cpu0": "h100-llama3-8b",
        "cpu1": "h100-llama3-8b",
        "eight": "a6000-mistral-7b",
    }


@pytest.mark.parametrize(
    ("gpus", "places"), [((), [(), ()]), ((0, 1, 2), [(0,), (1,), (2,)])], ids=["cpu", "gpus"]
)
def test_an_empty_file_is_a_runtime_on_every_gpu_or_two_on_the_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: tuple[int, ...],
    places: list[tuple[int, ...]],
) -> None:
    monkeypatch.setattr(fleet_file, "gpu_indices", lambda: gpus)
    plan = load_fleet(write(tmp_path, 'model_path = "m"'))
    assert [spec.gpus for spec in plan.specs] == places


def test_servers_alone_start_nothing(tmp_path: Path) -> None:
    plan = load_fleet(write(tmp_path, '[[attach]]\nurl = "http://127.0.0.1:1"'))
    assert (plan.specs, len(plan.attach)) == ((), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "is not TOML"),
        ("polcy = 'x'", "polcy: Extra inputs are not permitted"),
        ("[[runtime]]\ngpu = [0]", "runtime.0.gpu: Extra inputs"),
        ("[[runtime]]\ngpus = ['0']", r"runtime.0.gpus.0: Input should be a valid integer"),
        ("[runtimes]\nkv_tokens = 0", "runtimes.kv_tokens: Input should be greater than 0"),
        ("[runtimes]\norder = 'best'", "runtimes.order: Input should be 'fcfs', 'lpm'"),
        ("[[runtime]]\nname = 'x'", r'a \[\[runtime\]\] needs gpus = \[...\] or device = "cpu"'),
        ("[[runtime]]\ngpus = [0]\n[[runtime]]\ngpus = [1, 0]", "GPU 0 is given to two runtimes"),
        ("[[runtime]]\ngpus = [0]\ndevice = 'cpu'", "a runtime on gpus = .0. is one, and not on the CPU"),
        ("[[runtime]]\ngpus = [0]\ncount = 2", "a runtime on gpus = .0. is one"),
        ("[[attach]]\nurl = 'http://h'\napi_key_env = 'NO_KEY'", "set the variable NO_KEY to its key"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_file_and_the_place(
    tmp_path: Path, text: str, message: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InputError, match=message) as caught:
        load_fleet(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml cannot be read: No such file"):
        load_fleet(tmp_path / "none.toml")
