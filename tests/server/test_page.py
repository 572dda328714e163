"""The live page in a browser: its numbers are the API's, and it works with keys, a keyboard and a phone."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from preble_sgl.server.tenants import Tenant, Tenants, digest
from tests.server.serving import Served, served_emulated

if TYPE_CHECKING:
    from playwright.async_api import Page

BROWSER = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")


@asynccontextmanager
async def opened(server: Served, width: int = 1280) -> "AsyncIterator[Page]":
    """Open the page; fail at the end if the browser had anything to say, or asked anybody else."""
    from playwright.async_api import async_playwright

    said: list[str] = []
    asked: set[str] = set()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        tab = await browser.new_page(viewport={"width": width, "height": 900})
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.add(request.url))
        await tab.goto(f"{server.url}/ui")
        yield tab
        await browser.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {
        f"{server.url}/ui",
        f"{server.url}/ui/events",
    }


async def ask(server: Served, num: int, key: str = "none") -> None:
    for number in range(num):
        messages = [{"role": "user", "content": "a shared beginning " * 20 + str(number)}]
        body = {"messages": messages, "max_tokens": 4}
        reply = await server.post("/v1/chat/completions", body, authorization=f"Bearer {key}")
        assert reply.status == 200


async def number(page: "Page", name: str) -> int:
    return int((await page.locator(f"#{name}").inner_text()).replace(",", ""))


async def wait_shown(page: "Page") -> None:
    """Wait for a picture that was made after now."""
    seen = int(await page.evaluate("document.body.dataset.shown ?? 0"))
    await page.wait_for_function(f"(document.body.dataset.shown ?? 0) >= {seen + 2}")


async def test_its_numbers_are_those_of_the_api(emulated: Served) -> None:
    await ask(emulated, 8)
    async with opened(emulated) as page:
        await wait_shown(page)
        workers = emulated.fleet.describe_workers()
        assert await number(page, "num_finished") == 8
        for name in ("prompt_tokens", "cached_tokens"):
            assert await number(page, name) == sum(worker[name] for worker in workers)
        assert await number(page, "num_nodes") == emulated.fleet.scheduler.snapshot().num_nodes
        assert await page.locator("#workers tbody tr").count() == 2
        assert await page.locator("#placements tbody tr").count() == 8
        assert await page.locator("#calls rect").count() == 8
        assert await page.locator("#tree rect").count() == len(emulated.fleet.scheduler.picture(300))


async def test_it_follows_what_happens(emulated: Served) -> None:
    async with opened(emulated) as page:
        await wait_shown(page)
        assert await number(page, "num_finished") == 0
        await ask(emulated, 3)
        await wait_shown(page)
        assert await number(page, "num_finished") == 3


async def test_the_tree_is_walked_with_the_keyboard(emulated: Served) -> None:
    await ask(emulated, 5)
    async with opened(emulated) as page:
        await wait_shown(page)
        await page.locator("#tree rect").first.focus()
        first = await page.locator("#told").inner_text()
        assert first.startswith("tokens 0 to ")
        await page.keyboard.press("ArrowRight")
        assert await page.locator("#told").inner_text() != first
        await wait_shown(page)
        assert await page.evaluate("document.activeElement.dataset.at") == "1"


async def test_with_keys_it_asks_for_one(tiny_model: Path) -> None:
    keys = {digest("key-of-a"): Tenant("a"), digest("key-of-admin"): Tenant("boss", is_admin=True)}
    async with served_emulated(tiny_model, Tenants(keys)) as server, opened(server) as page:
        await page.locator("#ask").wait_for(state="visible")
        await page.locator("#key").fill("key-of-admin")
        await page.keyboard.press("Enter")
        await page.locator("#workers tbody tr").first.wait_for()
        assert await page.locator("#ask").is_hidden()


async def test_sixty_four_workers_and_ten_thousand_nodes_fit_a_phone(tiny_model: Path) -> None:
    async with served_emulated(tiny_model, num=64, kv_tokens=10**6) as server:
        runtime_ids = server.fleet.worker_ids
        for at in range(10_000):
            prompt = [at % 64, *range(100, 104), 1000 + at]
            tail = server.fleet.scheduler._tree.insert("", _packed(prompt), runtime_ids[at % 64])
            server.fleet.scheduler._tree.unlock(tail, runtime_ids[at % 64])
        async with opened(server, width=390) as page:
            await wait_shown(page)
            assert await number(page, "num_nodes") >= 10_000
            assert await page.locator("#workers tbody tr").count() == 64
            assert 0 < await page.locator("#tree rect").count() <= 601
            assert await page.evaluate("document.documentElement.scrollWidth") <= 390


def _packed(prompt: list[int]) -> bytes:
    from preble_sgl.core import token_ids

    return token_ids(prompt).tobytes()


async def test_the_feed_ends_with_the_server(emulated: Served) -> None:
    async with emulated.session.get(f"{emulated.url}/ui/events") as response:
        assert await response.content.readany()
        emulated.gateway.is_closing = True
        async with asyncio.timeout(5):
            await response.content.read()
