"""Measure an SGLang server with requests of its own making.

Each round measures every point once; the first round only warms the server up, and a point's value is the
median of the others. Engine time of a prefill is what the server itself counted as busy (`/v1/loads`), which
tells it apart from HTTP and tokenising; time of a decode step is the mean gap between tokens while exactly
the wanted batch runs. Prompts are random, and their token ids low enough for any vocabulary.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import fmean, median
from time import perf_counter
from typing import Any

import aiohttp
import orjson

from preble_sgl.core import ProgramId, Request, SamplingParams, Usage, new_request_id, token_ids
from preble_sgl.errors import InputError, RequestRejected, RuntimeLost
from preble_sgl.runtime_ext.client import SglangRuntime, open_session, read_settings
from preble_sgl.runtime_ext.probe_points import OUTPUT_LEN, Limits, Point
from preble_sgl.runtime_ext.protocol import RuntimeInfo, RuntimeLoad
from preble_sgl.runtime_ext.wire import refusal

TOKENS = range(300, 2000)
CHANCE_LEN = 2
"""Tokens beyond the wanted ones that may be cached because two random prompts begin alike."""
MIN_STEPS = 8
POLL_S = 0.005
REPORT_TIMEOUT_S = 10.0
BATCH_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The medians of one point, in seconds.

    `engine_s`: busy time of the engine, of one step in a decode. `ttft_s`: until the first token, only where
    one prompt ran alone. `context`: KV tokens that a decode step read.
    """

    point: Point
    engine_s: float
    ttft_s: float | None = None
    context: float = 0.0


@dataclass(slots=True)
class _Answer:
    """One streamed answer: when how many tokens had come, and what it used."""

    started_at: float
    arrivals: list[tuple[float, int]]
    usage: Usage

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.started_at


@asynccontextmanager
async def open_probe(url: str, *, seed: int = 0) -> AsyncIterator["Probe"]:
    """Connect to a server to measure it. Raises InputError or RuntimeLost as `SglangRuntime.attach` does."""
    async with SglangRuntime.attach(url) as runtime, open_session(url) as session:
        limits = Limits.of(await read_settings(session, url))
        yield Probe(runtime, session, limits, random.Random(seed))


class Probe:
    """Sends measured requests to one server that nobody else may use meanwhile."""

    def __init__(
        self, runtime: SglangRuntime, session: aiohttp.ClientSession, limits: Limits, rng: random.Random
    ) -> None:
        self.limits = limits
        self._runtime = runtime
        self._session = session
        self._rng = rng

    @property
    def info(self) -> RuntimeInfo:
        """What the server says about itself."""
        return self._runtime.info

    async def measure(
        self, points: Sequence[Point], num_rounds: int, on_point: Callable[[], None] = lambda: None
    ) -> tuple[Measurement, ...]:
        """Measure each point in `num_rounds` rounds after a warm-up; the cache is empty before and after.

        Calls `on_point` after each of the (num_rounds + 1) · len(points). Leaves out decode batches that the
        server does not run at once. Raises InputError for a server that is in use or reuses no prefixes.
        """
        await self._require_idle()
        readings: dict[Point, list[Measurement]] = defaultdict(list)
        for round_ in range(num_rounds + 1):
            await self._runtime.flush_cache()
            async for reading in self._round(points):
                on_point()
                if reading is not None and round_ > 0:
                    readings[reading.point].append(reading)
        await self._runtime.flush_cache()
        return tuple(_medians(readings[point]) for point in points if readings[point])

    async def _round(self, points: Sequence[Point]) -> AsyncIterator[Measurement | None]:
        """Measure each point once."""
        cached: list[int] = []
        for point in points:
            if point.kind == "hit" and len(cached) != point.cached_len:
                cached = await self._warm(point.cached_len)
            elif point.kind in ("together", "decode"):
                await self._runtime.flush_cache()
            match point.kind:
                case "cold" | "hit":
                    yield await self._alone(point, cached[: point.cached_len])
                case "together":
                    yield await self._together(point)
                case "decode":
                    yield await self._decode(point)

    async def _warm(self, length: int) -> list[int]:
        """Cache a new random prefix in an empty cache and return it."""
        await self._runtime.flush_cache()
        prefix = self._prompt(length)
        await self._counted([prefix], output_len=0)
        return prefix

    async def _alone(self, point: Point, cached: list[int]) -> Measurement:
        """Prefill one prompt on the idle server."""
        (answer,), engine_s = await self._counted([cached + self._prompt(point.new_len)], output_len=1)
        page_size = self._runtime.info.page_size
        cached_len = answer.usage.cached_tokens
        if not -page_size < cached_len - point.cached_len < page_size + CHANCE_LEN:
            raise InputError(
                f"{self._url}: {cached_len} tokens came from the cache where {point.cached_len} were known: "
                "calibrate one server (not several data-parallel ranks) with its prefix cache on"
            )
        return Measurement(point=point, engine_s=engine_s, ttft_s=answer.ttft_s)

    async def _together(self, point: Point) -> Measurement:
        """Prefill prompts that reach the scheduler in one message and so run in one iteration."""
        body = orjson.dumps(
            {
                "input_ids": [self._prompt(point.new_len) for _ in range(point.num_requests)],
                "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
            }
        )
        before = await self._runtime.loads()
        answers = await self._post(body)
        metas = [answer["meta_info"] for answer in answers]
        computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
        return Measurement(point=point, engine_s=await self._busy_since(before, computed))

    async def _decode(self, point: Point) -> Measurement | None:
        """Run requests side by side; None if they did not all run at once for long enough."""
        prompts = [self._prompt(point.new_len) for _ in range(point.num_requests)]
        answers, _ = await self._counted(prompts, output_len=OUTPUT_LEN)
        from_at = max(answer.arrivals[0][0] for answer in answers)
        until_at = min(answer.arrivals[-1][0] for answer in answers)
        steps = [_steps(answer, from_at, until_at) for answer in answers]
        if min(count for _, count, _ in steps) < MIN_STEPS:
            return None
        context = sum(point.new_len + middle for _, _, middle in steps)
        return Measurement(
            point=point,
            engine_s=fmean(elapsed_s / count for elapsed_s, count, _ in steps),
            context=context,
        )

    async def _counted(self, prompts: Sequence[list[int]], *, output_len: int) -> tuple[list[_Answer], float]:
        """Send prompts at once; return the answers and for how long the engine was busy with prefilling."""
        before = await self._runtime.loads()
        answers = await asyncio.gather(*(self._stream(prompt, output_len) for prompt in prompts))
        computed = sum(answer.usage.computed_tokens for answer in answers)
        return answers, await self._busy_since(before, computed)

    async def _stream(self, prompt: list[int], output_len: int) -> _Answer:
        request = Request(
            request_id=new_request_id(),
            program_id=ProgramId("calibrate"),
            call_path="calibrate",
            prompt=token_ids(prompt),
            sampling=SamplingParams(max_new_tokens=output_len, temperature=0.0, ignore_eos=True),
        )
        answer = _Answer(perf_counter(), [], Usage())
        num_tokens = 0
        async for chunk in self._runtime.stream(request):
            num_tokens += len(chunk.output_ids)
            answer.arrivals.append((perf_counter(), num_tokens))
            answer.usage = chunk.usage
        return answer

    async def _busy_since(self, before: RuntimeLoad, computed: int) -> float:
        """Wait until the server has accounted for `computed` tokens; return its busy seconds with them."""
        expected = before.prefilled_tokens + computed
        give_up_at = perf_counter() + REPORT_TIMEOUT_S
        while perf_counter() < give_up_at:
            load = await self._runtime.loads()
            if load.prefilled_tokens > expected:
                raise self._in_use()
            if load.prefilled_tokens == expected and not load.num_running + load.num_waiting:
                return load.prefill_busy_s - before.prefill_busy_s
            await asyncio.sleep(POLL_S)
        raise InputError(
            f"{self._url} did not account for {computed} prefilled tokens within {REPORT_TIMEOUT_S:g} s: "
            "calibrate needs an SGLang 0.5.23 that nobody else uses"
        )

    async def _require_idle(self) -> None:
        load = await self._runtime.loads()
        if load.num_running + load.num_waiting:
            raise self._in_use()

    async def _post(self, body: bytes) -> list[dict[str, Any]]:
        headers = {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=BATCH_TIMEOUT_S)
        try:
            async with self._session.post(
                "generate", data=body, headers=headers, timeout=timeout
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise RuntimeLost(f"{self._url}: {error or type(error).__name__}") from error
        if response.status != 200:
            raise RequestRejected(f"{self._url}: {refusal(answer)}")
        decoded: list[dict[str, Any]] = orjson.loads(answer)
        return decoded

    def _prompt(self, length: int) -> list[int]:
        return self._rng.choices(TOKENS, k=length)

    def _in_use(self) -> InputError:
        return InputError(f"{self._url} is in use by others: calibrate needs a server for itself")

    @property
    def _url(self) -> str:
        return self._runtime.info.url


def _steps(answer: _Answer, from_at: float, until_at: float) -> tuple[float, int, float]:
    """Return seconds and tokens between the first and last arrival of a time span, and the mean count."""
    inside = [arrival for arrival in answer.arrivals if from_at <= arrival[0] <= until_at]
    if not inside:
        return 0.0, 0, 0.0
    (first_at, first), (last_at, last) = inside[0], inside[-1]
    return last_at - first_at, last - first, (first + last) / 2


def _medians(readings: Sequence[Measurement]) -> Measurement:
    ttfts = [reading.ttft_s for reading in readings if reading.ttft_s is not None]
    return Measurement(
        point=readings[0].point,
        engine_s=median(reading.engine_s for reading in readings),
        ttft_s=median(ttfts) if ttfts else None,
        context=median(reading.context for reading in readings),
    )
