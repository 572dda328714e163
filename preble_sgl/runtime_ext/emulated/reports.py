"""What a runtime says about itself: health, settings, models, load, metrics. All of it only reads.

Not modelled, and reported as SGLang reports what it has not: throughput over the last seconds, moments of
decode steps.
"""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from preble_sgl.runtime_ext.emulated.config import SGLANG_VERSION
from preble_sgl.runtime_ext.emulated.emulation import EMULATION, Emulation
from preble_sgl.runtime_ext.emulated.http_answers import json_response

HEALTH_S = 1.0
"""SGLang's health check generates a token and never takes less; `/ready` answers at once."""


async def ready(call: web.Request) -> web.Response:
    """Say that requests are taken."""
    return web.Response()


async def health(call: web.Request) -> web.Response:
    """Say that the engine works, as late as SGLang does."""
    await asyncio.sleep(HEALTH_S)
    return web.Response()


async def server_info(call: web.Request) -> web.Response:
    """Report the settings, and under `emulated` what a real server does not have."""
    emulation = call.app[EMULATION]
    return json_response(_settings(emulation) | {"emulated": _emulated(emulation)})


async def model_info(call: web.Request) -> web.Response:
    """Report the model."""
    name = call.app[EMULATION].config.served_name
    return json_response(
        {
            "model_path": name,
            "served_model_name": name,
            "tokenizer_path": name,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "emulated",
            "architectures": None,
        }
    )


async def models(call: web.Request) -> web.Response:
    """List the model as OpenAI does."""
    emulation = call.app[EMULATION]
    name = emulation.config.served_name
    card = {
        "id": name,
        "object": "model",
        "created": int(emulation.started_at),
        "owned_by": "sglang",
        "root": name,
        "parent": None,
        "max_model_len": emulation.driver.max_input_len + 1,
    }
    return json_response({"object": "list", "data": [card]})


async def loads(call: web.Request) -> web.Response:
    """Report the load of the one rank there is."""
    return json_response(
        {
            "timestamp": datetime.now(UTC).isoformat(),
            "version": SGLANG_VERSION,
            "accelerator": "emulated",
            "num_accelerators": 1,
            "loads": [_load(call.app[EMULATION])],
        }
    )


async def metrics(call: web.Request) -> web.Response:
    """Report some of SGLang's metrics in Prometheus' text format."""
    emulation = call.app[EMULATION]
    load, served = _load(emulation), emulation.driver.served
    values = [
        ("num_running_reqs", "gauge", load["num_running_reqs"]),
        ("num_queue_reqs", "gauge", load["num_waiting_reqs"]),
        ("num_used_tokens", "gauge", load["num_used_tokens"]),
        ("token_usage", "gauge", load["token_usage"]),
        ("cache_hit_rate", "gauge", load["cache_hit_rate"]),
        ("prompt_tokens_total", "counter", served.prompt_tokens),
        ("generation_tokens_total", "counter", served.output_tokens),
        ("cached_tokens_total", "counter", served.cached_tokens),
    ]
    label = f'{{model_name="{emulation.config.served_name}"}}'
    lines = [f"# TYPE sglang:{name} {kind}\nsglang:{name}{label} {value}\n" for name, kind, value in values]
    return web.Response(text="".join(lines))


def _settings(emulation: Emulation) -> dict[str, Any]:
    config, engine = emulation.config, emulation.config.engine
    return {
        "model_path": config.served_name,
        "served_model_name": config.served_name,
        "tokenizer_path": config.served_name,
        "device": config.device,
        "version": SGLANG_VERSION,
        "page_size": engine.page_size,
        "max_total_num_tokens": emulation.driver.load().kv_tokens,
        "max_req_input_len": emulation.driver.max_input_len,
        "max_running_requests": engine.max_running,
        "max_prefill_tokens": engine.max_prefill_tokens,
        "chunked_prefill_size": engine.chunk_tokens or -1,
        "enable_mixed_chunk": engine.mixed_chunk,
        "schedule_policy": engine.order,
        "enable_priority_scheduling": False,
        "incremental_streaming_output": config.incremental,
        "enable_cache_report": True,
        "tp_size": 1,
        "dp_size": 1,
        "kv_events": emulation.publisher.describe(engine.page_size),
        "internal_states": [_load(emulation)],
    }


def _emulated(emulation: Emulation) -> dict[str, Any]:
    """Return what is emulated, and how well this machine keeps up with the engine model's clock."""
    lateness = emulation.driver.lateness
    return {
        "profile": emulation.config.profile,
        "overhead_s": emulation.config.overhead_s,
        "iterations": lateness.num,
        "mean_lateness_s": lateness.mean_s,
        "max_lateness_s": lateness.max_s,
    }


def _load(emulation: Emulation) -> dict[str, Any]:
    load, served = emulation.driver.load(), emulation.driver.served
    usage = load.used_tokens / load.kv_tokens
    return {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": load.num_running,
        "num_waiting_reqs": load.num_waiting,
        "num_waiting_uncached_tokens": load.waiting_tokens,
        "num_used_tokens": load.used_tokens,
        "num_total_tokens": load.used_tokens + load.waiting_tokens,
        "num_active_tokens": load.used_tokens + load.waiting_tokens,
        "num_prealloc_ready_tokens": 0,
        "max_total_num_tokens": load.kv_tokens,
        "max_running_requests": emulation.config.engine.max_running,
        "token_usage": usage,
        "gen_throughput": 0.0,
        "cache_hit_rate": served.cached_tokens / max(1, served.prompt_tokens),
        "utilization": usage,
        "total_prefill_uncached_tokens": load.prefilled_tokens,
        "total_prefill_busy_us": round(1e6 * load.prefill_busy_s),
        "decode_moments": None,
        "queues": {
            "waiting": load.num_waiting,
            "grammar": 0,
            "paused": 0,
            "retracted": 0,
            "prealloc_ready": 0,
        },
    }
