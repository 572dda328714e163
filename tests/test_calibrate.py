"""Calibration: what is measured and written, and every way in which it refuses."""

from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from preble_sgl.commands.calibrate import Calibration, fit_measured
from preble_sgl.commands.profile_file import write_profile
from preble_sgl.errors import InputError, RuntimeLost
from preble_sgl.profiles import Profile, load_profile
from preble_sgl.runtime_ext import probe
from preble_sgl.runtime_ext.probe import Measurement, open_probe
from preble_sgl.runtime_ext.probe_points import OUTPUT_LEN, Limits, Point, choose_points
from preble_sgl.sim.step_cost import StepCost
from tests.accounting_server import VERSION, AccountingServer, accounting
from tests.runtime_ext.scripted_server import ScriptedServer, serving
from tests.test_cli import run

COST = StepCost(
    floor_s=0.004, base_s=0.003, token_s=2e-5, request_s=2e-4, context_s=4e-7, attention_square_s=1e-8
)
LIMITS = Limits(kv_tokens=65536, max_input_len=32762, chunk_tokens=4096)
POINTS = (
    Point("cold", 1, 100),
    Point("hit", 1, 10, 500),
    Point("hit", 1, 30, 500),
    Point("together", 3, 40),
    Point("decode", 1, 20),
)


@pytest.fixture
def server() -> AccountingServer:
    return AccountingServer(COST, LIMITS)


@pytest.fixture
async def url(server: AccountingServer) -> AsyncIterator[str]:
    async with accounting(server) as address:
        yield address


def calibration(tmp_path: Path) -> Calibration:
    return Calibration.checked(tmp_path / "new.toml", model=None, hardware=None, quick=True)


async def measure(url: str, *points: Point, rounds: int = 1) -> dict[Point, Measurement]:
    async with open_probe(url) as one:
        return {found.point: found for found in await one.measure(points, rounds)}


async def test_prefills_take_what_the_server_says_that_they_took(server: AccountingServer, url: str) -> None:
    found = await measure(url, *POINTS)
    engine_s = {point: found[point].engine_s for point in POINTS[:-1]}
    # Two random prompts may begin with the same token, which is then cached.
    assert engine_s == pytest.approx(
        {
            POINTS[0]: COST.seconds([(100, 100)]),
            POINTS[1]: COST.seconds([(10, 510)]),
            POINTS[2]: COST.seconds([(30, 530)]),
            POINTS[3]: COST.seconds([(40, 40)] * 3),
        },
        abs=3 * COST.token_s,
    )
    assert {point.kind for point in POINTS if found[point].ttft_s is not None} == {"cold", "hit"}
    assert found[POINTS[-1]].context == 20 + (1 + OUTPUT_LEN) / 2


async def test_the_cache_is_empty_at_the_end_and_each_point_is_told_as_it_is_measured(
    server: AccountingServer, url: str
) -> None:
    told: list[None] = []
    async with open_probe(url) as one:
        await one.measure(POINTS[:3], 2, lambda: told.append(None))
    assert len(told) == 3 * 3
    assert server.prompts == []
    assert server.flushes > 3


async def test_a_batch_that_the_server_does_not_run_at_once_is_left_out(
    server: AccountingServer, url: str
) -> None:
    server.one_at_a_time = True
    lone, batch = Point("decode", 1, 20), Point("decode", 3, 20)
    assert set(await measure(url, lone, batch)) == {lone}


async def test_a_server_that_runs_requests_of_others_is_refused(server: AccountingServer, url: str) -> None:
    server.num_foreign = 1
    with pytest.raises(InputError, match="is in use by others: calibrate needs a server for itself"):
        await measure(url, *POINTS)
    assert server.flushes == 0


async def test_others_are_noticed_while_measuring_by_what_they_prefill(
    server: AccountingServer, url: str
) -> None:
    server.foreign_tokens = 5
    with pytest.raises(InputError, match="is in use by others"):
        await measure(url, *POINTS)


async def test_a_server_without_a_prefix_cache_is_refused(server: AccountingServer, url: str) -> None:
    server.with_cache = False
    with pytest.raises(InputError, match=r"0 tokens came from the cache where 500 were known.*cache on"):
        await measure(url, *POINTS)


async def test_a_server_that_keeps_no_accounts_is_refused(
    server: AccountingServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.accounts = False
    monkeypatch.setattr(probe, "REPORT_TIMEOUT_S", 0.05)
    with pytest.raises(InputError, match=r"did not account for 100 prefilled tokens within 0\.05 s"):
        await measure(url, POINTS[0])


@pytest.mark.parametrize("quick", [True, False])
def test_points_fit_the_server(quick: bool) -> None:
    small = Limits(kv_tokens=4000, max_input_len=1000, chunk_tokens=512)
    points = choose_points(small, quick=quick)
    assert {point.kind for point in points} == {"cold", "hit", "together", "decode"}
    assert max(point.kv_tokens for point in points) <= 3600
    assert max(point.new_len + point.cached_len for point in points) < 1000
    assert max(p.num_requests * p.new_len for p in points if p.kind == "together") <= 512


def test_a_server_too_small_for_any_point_is_refused() -> None:
    with pytest.raises(InputError, match=r"a server of 16 KV tokens .* is too small to calibrate"):
        choose_points(Limits(kv_tokens=16, max_input_len=10, chunk_tokens=8), quick=True)


def test_a_server_without_chunks_prefills_up_to_its_limit() -> None:
    settings = {"max_total_num_tokens": 1000, "max_req_input_len": 900, "chunked_prefill_size": -1}
    assert Limits.of(settings).chunk_tokens == 16384
    assert Limits.of(settings | {"max_prefill_tokens": 5000}).chunk_tokens == 5000


async def test_a_server_that_is_not_sglang_is_named(tmp_path: Path) -> None:
    async with serving(ScriptedServer(settings={"hello": "world"})) as address:
        with pytest.raises(InputError, match="answers, but is not an SGLang server"):
            await calibration(tmp_path).run(address, None, None)
    with pytest.raises(RuntimeLost, match="no runtime answers"):
        await calibration(tmp_path).run("http://127.0.0.1:9", None, None)
    assert list(tmp_path.iterdir()) == []


async def test_a_refusal_in_the_middle_is_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(self: AccountingServer, call: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "the queue is full"}}, status=503)

    monkeypatch.setattr(AccountingServer, "generate", refuse)
    async with accounting(AccountingServer(COST, LIMITS)) as address:
        for point in (Point("cold", 1, 10), Point("together", 2, 10)):
            with pytest.raises(Exception, match="the queue is full"):
                await measure(address, point)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{}/no/such/dir/p.toml"], "no/such/dir does not exist"),
        (["--out", "{}/p.json"], "profiles are read from .toml files, name it p.toml"),
        (
            ["--out", "{}/p.toml", "--attach", "http://127.0.0.1:9", "--kv-tokens", "9"],
            "leave out --model-path",
        ),
        (
            ["--out", "{}/p.toml", "--attach", "http://127.0.0.1:9"],
            "no runtime answers at http://127.0.0.1:9",
        ),
        (["--out", "{}/p.toml", "--model-path", "/no/such/model"], "no model at /no/such/model"),
    ],
)
def test_bad_options_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "calibrate", *(word.format(tmp_path) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


PROFILE = Profile(
    name="new",
    kind="measured",
    hardware='a "fast" C:\\ box\twith\x7f DEL',
    model="some-llama",
    source="words " * 60 + 'and """quotes""" \\ to end',
    error="",
    kv_tokens=1000,
    chunk_tokens=512,
    step=StepCost(floor_s=0.0, base_s=0.001, token_s=2.5e-05, attention_pair_s=1.25e-10, min_pairs=1024),
    overhead_s=0.002,
)


def test_a_written_profile_is_read_back_as_it_was(tmp_path: Path) -> None:
    write_profile(tmp_path / "new.toml", PROFILE)
    read = load_profile(tmp_path / "new.toml")
    assert read == replace(PROFILE, source=read.source)
    assert read.source.split() == PROFILE.source.split()


async def test_a_calibration_writes_a_profile_and_its_measurements(
    server: AccountingServer, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await calibration(tmp_path).run(url, None, None)
    check_written(tmp_path, capsys.readouterr().out)
    profile = load_profile(tmp_path / "new.toml")
    assert (profile.model, profile.hardware) == ("some-llama", "cpu, not named")
    assert f"SGLang {VERSION}: " in profile.source


def test_the_cpu_profile_follows_from_the_measurements_that_are_kept_of_it() -> None:
    results = orjson.loads(Path("benchmarks/results/calibrate_cpu_tiny.json").read_bytes())
    measured = [
        Measurement(
            point=Point(**one["point"]),
            engine_s=one["engine_s"],
            ttft_s=one["ttft_s"],
            context=one["context"],
        )
        for one in results["points"]
    ]
    profile = load_profile("cpu-tiny")
    fit = fit_measured(measured, profile.chunk_tokens)
    assert asdict(fit.step) == pytest.approx(asdict(profile.step), rel=1e-3)
    assert fit.overhead_s == pytest.approx(profile.overhead_s, rel=1e-3)
    for error in fit.errors().values():
        assert f"mean {error.mean:.1%}, at most {error.max:.0%} of" in profile.error


@pytest.mark.sglang
async def test_a_real_runtime_can_be_calibrated(
    runtime_urls: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await calibration(tmp_path).run(runtime_urls[0], None, None)
    check_written(tmp_path, capsys.readouterr().out)
    assert load_profile(tmp_path / "new.toml").kv_tokens == 65536


def check_written(folder: Path, printed: str) -> None:
    """Check that the output, the profile and the measurements tell the same."""
    profile = load_profile(folder / "new.toml")
    results = orjson.loads((folder / "new.json").read_bytes())
    errors = orjson.loads(printed.splitlines()[-1])
    assert results["errors"] == errors
    assert {"cold", "hit", "together"} <= set(errors)
    assert results["profile"]["step"]["token_s"] == pytest.approx(profile.step.token_s, rel=1e-3)
    assert len(results["points"]) == sum(error["points"] for error in errors.values())
    assert f"{errors['cold']['mean']:.1%}"[:-2] in profile.error
    assert "measured against predicted" in printed
