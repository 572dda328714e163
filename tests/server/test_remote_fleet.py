"""Programs against a served fleet."""

import asyncio
from pathlib import Path

import pytest

import preble_sgl as ps
from preble_sgl.runtime_ext.emulated.launch import launch_emulated
from preble_sgl.server.tenants import Tenant, Tenants, digest
from tests.runtime_ext.emulated.runtimes import config
from tests.server.serving import Served, served, served_emulated

pytestmark = pytest.mark.usefixtures("with_and_without_front")

DIMS = ["clarity", "depth", "style"]


@ps.program
async def judge(s: ps.State, essay: str) -> str:
    s += ps.user(essay)
    notes = await s.map(DIMS, lambda b, dim: b.ask(ps.user(dim), max_tokens=4))
    s += ps.user(" ".join(notes))
    return await s.gen(max_tokens=4)


ESSAYS = [f"An essay about number {number}. " * 10 for number in range(4)]
ROWS = [{"essay": essay} for essay in ESSAYS]


async def test_programs_run_as_they_do_beside_the_fleet(emulated: Served) -> None:
    async with ps.Fleet.connect(emulated.url) as remote:
        there = await judge.amap(ROWS, fleet=remote)
    here = await judge.amap(ROWS, fleet=emulated.fleet)
    assert [run.value for run in there] == [run.value for run in here]
    await emulated.wait_idle()
    assert len(emulated.gateway.programs) == 0, "every program run was let go of"
    assert emulated.fleet.scheduler.snapshot().num_open_programs == 0
    assert {record.program_id.split("/")[0] for record in emulated.gateway.recent} >= {"default"}


async def test_calls_of_one_program_run_are_one_program_to_the_server(emulated: Served) -> None:
    async with ps.Fleet.connect(emulated.url) as remote:
        await judge.amap(ROWS[:2], fleet=remote)
    programs = {record.program_id for record in emulated.gateway.recent}
    assert len(programs) == 2
    assert len(emulated.gateway.recent) == 2 * 4


async def test_a_key_is_sent(tiny_model: Path) -> None:
    keys = Tenants({digest("key-of-a"): Tenant("a", namespace="a")})
    async with served_emulated(tiny_model, keys) as server:
        with pytest.raises(ps.InputError):
            async with ps.Fleet.connect(server.url):
                pass
        async with ps.Fleet.connect(server.url, api_key="key-of-a") as remote:
            await judge.amap(ROWS[:1], fleet=remote)
        assert {record.tenant for record in server.gateway.recent} == {"a"}


async def test_an_answer_whose_runtime_is_lost_goes_on_with_the_tokens_that_it_has(tiny_model: Path) -> None:
    @ps.program
    async def long(s: ps.State) -> str:
        s += ps.user("a long story")
        return await s.gen(max_tokens=60)

    one = config(0.02, engine={"kv_tokens": 20_000}, model_path=str(tiny_model))
    async with (
        launch_emulated([one] * 2, [0, 0]) as running,
        served([each.url for each in running], tiny_model) as server,
        ps.Fleet.connect(server.url) as remote,
    ):
        asking = asyncio.create_task(long.arun(remote))
        while not (decoding := [w for w in server.fleet.describe_workers() if w["num_decode"]]):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        (dying,) = [each for each in running if each.url == decoding[0]["url"]]
        dying.process.kill()
        await dying.process.wait()
        answer = await asking
        await server.wait_idle()
        staying = server.fleet.describe_workers()
        assert isinstance(answer, str)
        assert 0 < sum(worker["output_tokens"] for worker in staying) < 60


@pytest.mark.sglang
async def test_on_real_runtimes_answers_are_those_of_the_fleet_itself(real: Served) -> None:
    here = await judge.amap(ROWS[:2], fleet=real.fleet)
    async with ps.Fleet.connect(real.url) as remote:
        there = await judge.amap(ROWS[:2], fleet=remote)
    assert [run.value for run in there] == [run.value for run in here]
