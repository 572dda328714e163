"""SGLang's flags: written, and refused before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.environment import child_environment
from preble_sgl.runtime_ext.sglang_flags import (
    FlagValue,
    check_flags,
    check_quantization,
    flag_arguments,
    known_flags,
)

OFFERED = (
    *("served_model_name", "dtype", "quantization", "context_length", "trust_remote_code"),
    *("mem_fraction_static", "max_running_requests", "max_queued_requests", "page_size"),
    *("chunked_prefill_size", "max_prefill_tokens", "schedule_conservativeness", "radix_eviction_policy"),
    *("radix_eviction_policy_config", "disable_radix_cache", "enable_session_radix_cache"),
    *("radix_cache_backend", "enable_priority_scheduling", "enable_metrics", "enable_cache_report"),
    *("decode_log_interval", "load_snapshot_publish_interval", "stream_interval"),
    *("incremental_streaming_output", "tokenizer_worker_num", "enable_hierarchical_cache"),
    *("hicache_ratio", "hicache_size", "disaggregation_mode", "lora_paths", "api_key", "admin_api_key"),
    *("watchdog_timeout", "soft_watchdog_timeout", "sleep_on_idle", "skip_server_warmup", "config"),
    *("random_seed", "log_level", "load_format"),
)

FLAGS: dict[str, FlagValue] = {
    "mem_fraction_static": 0.8,
    "disable_radix_cache": True,
    "enable_mixed_chunk": False,
    "cuda_graph_bs_decode": [1, 2, 4],
    "served_model_name": "m",
    "radix_eviction_policy_config": {"a": 1},
}


def model(path: Path, quant_method: str | None = None) -> Path:
    config = {"quantization_config": {"quant_method": quant_method}} if quant_method else {}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_flags_are_written_as_sglang_reads_them() -> None:
    assert flag_arguments(FLAGS) == [
        *("--mem-fraction-static", "0.8"),
        "--disable-radix-cache",
        *("--cuda-graph-bs-decode", "1", "2", "4"),
        *("--served-model-name", "m"),
        *("--radix-eviction-policy-config", '{"a":1}'),
    ]


def test_every_flag_that_a_user_may_want_is_known() -> None:
    assert [name for name in OFFERED if name not in known_flags()] == []
    check_flags({})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"mem_fraction_statc": 1},
            "no flag mem_fraction_statc: did you mean mem_fraction_static",
        ),
        ({"zzzzzzzz": 1}, "SGLang has no flag zzzzzzzz$"),
        ({"port": 1}, "port is set by `port`: give that instead"),
        ({"max_total_tokens": 1}, "max_total_tokens is set by `kv_tokens`"),
        ({"schedule_policy": "lpm"}, "schedule_policy is set by `order`"),
        ({"host": "0.0.0.0"}, "host cannot be given: runtimes listen on loopback only"),
        ({"dtype": "int3"}, "dtype=int3: SGLang takes auto, half, float16"),
    ],
)
def test_what_sglang_would_not_take_is_one_clear_error(flags: dict[str, FlagValue], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_flags(flags)


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "gguf", "compressed-tensors"])
def test_formats_that_sglang_loads_pass(tmp_path: Path, method: str) -> None:
    check_quantization(model(tmp_path), method)
    check_quantization(model(tmp_path, method), None)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (
            "billm",
            r"cannot load billm \(its 1-bit weights have no kernel there\); convert the model",
        ),
        ("OneBit", r"cannot load OneBit \(its 1-bit weights"),
        ("exl2", r"cannot load exl2 \(it is ExLlama's\)"),
        ("quip_sharp", r"cannot load quip_sharp \(it has no loader there\)"),
        ("dreamt-up", "cannot load dreamt-up; convert the model to one of: .*awq"),
    ],
)
def test_formats_that_sglang_cannot_load_are_refused_with_what_it_can(
    tmp_path: Path, method: str, why: str
) -> None:
    with pytest.raises(InputError, match=why):
        check_quantization(model(tmp_path), method)
    with pytest.raises(InputError, match=f"{tmp_path}: SGLang {why}"):
        check_quantization(model(tmp_path, method), None)


@pytest.mark.sglang
def test_sglang_itself_reads_them(tiny_model: Path) -> None:
    code = (
        "import sys, json; from sglang.srt.server_args import prepare_server_args as p; a = p(sys.argv[1:]);"
        "print(json.dumps([a.mem_fraction_static, a.disable_radix_cache, a.served_model_name]))"
    )
    arguments = ["--model-path", str(tiny_model), "--device", "cpu", *flag_arguments(FLAGS)]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=child_environment(()),
    )
    assert answer.stdout.splitlines()[-1:] == ['[0.8, true, "m"]'], answer.stderr[-2000:]
