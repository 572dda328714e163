"""What an emulated runtime says about itself, in SGLang's words."""

import asyncio

import pytest

from tests.runtime_ext.emulated.runtimes import NEVER_S, Emulated, config, running


async def test_the_settings_say_what_it_is_and_that_it_is_emulated() -> None:
    engine = {"kv_tokens": 4096, "page_size": 16, "order": "fcfs", "chunk_tokens": 512}
    async with running(config(engine=engine, overhead_s=0.001)) as emulated:
        await emulated.generate(1, 2, 3)
        info = (await emulated.get("/server_info")).json
        assert set(info) == set((await emulated.get("/get_server_info")).json)
    assert info["model_path"] == info["served_model_name"] == "emulated/test"
    assert (info["max_total_num_tokens"], info["page_size"], info["device"]) == (4096, 16, "cuda")
    assert (info["version"], info["schedule_policy"], info["chunked_prefill_size"]) == ("0.5.23", "fcfs", 512)
    assert 0 < info["max_req_input_len"] < 4096
    assert (info["kv_events"], len(info["internal_states"])) == (None, 1)
    assert info["emulated"]["profile"] == "test"
    assert (info["emulated"]["overhead_s"], info["emulated"]["iterations"]) == (0.001, 4)


@pytest.mark.parametrize("path", ["/ready", "/health", "/health_generate"])
async def test_it_is_ready_and_healthy(quick: Emulated, path: str) -> None:
    assert (await quick.get(path)).status == 200


async def test_the_model_is_listed(quick: Emulated) -> None:
    info = (await quick.get("/model_info")).json
    assert info == (await quick.get("/get_model_info")).json
    assert (info["model_path"], info["is_generation"]) == ("emulated/test", True)
    listed = (await quick.get("/v1/models")).json
    assert [(model["id"], model["object"]) for model in listed["data"]] == [("emulated/test", "model")]


async def test_the_load_counts_what_waits_runs_and_was_computed() -> None:
    async with running(config(NEVER_S, engine={"max_running": 1})) as emulated:
        asked = [asyncio.create_task(emulated.generate(*range(100), rid=f"r{i}")) for i in range(3)]
        async with asyncio.timeout(10):
            while (load := await emulated.load())["num_waiting_reqs"] != 2:
                await asyncio.sleep(0.01)
        for task in asked:
            task.cancel()
    assert (load["num_running_reqs"], load["max_running_requests"]) == (1, 1)
    assert (load["num_waiting_uncached_tokens"], load["total_prefill_uncached_tokens"]) == (200, 100)
    assert (load["num_used_tokens"], load["max_total_num_tokens"]) == (100, 2000)
    assert load["token_usage"] == pytest.approx(0.05)
    assert load["total_prefill_busy_us"] == 1e6 * NEVER_S


async def test_the_metrics_count_tokens(quick: Emulated) -> None:
    await quick.generate(*range(10))
    await quick.generate(*range(10))
    text = (await quick.get("/metrics")).body.decode()
    assert 'sglang:prompt_tokens_total{model_name="emulated/test"} 20\n' in text
    assert 'sglang:cached_tokens_total{model_name="emulated/test"} 9\n' in text
    assert 'sglang:generation_tokens_total{model_name="emulated/test"} 8\n' in text
    assert 'sglang:cache_hit_rate{model_name="emulated/test"} 0.45\n' in text
    assert 'sglang:num_running_reqs{model_name="emulated/test"} 0\n' in text


async def test_what_is_not_there_is_a_404_in_json(quick: Emulated) -> None:
    reply = await quick.get("/nothing")
    assert (reply.status, reply.json) == (404, {"detail": "Not Found"})
