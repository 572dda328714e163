"""Take the README's picture of the live page: `python -m benchmarks.live_page_shot [--out docs/live.png]`.

Eight emulated runtimes serve agents over a dozen tools for some seconds; the picture is what a browser shows.
"""

import asyncio
import random
import shutil
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

import aiohttp
import typer

from benchmarks.gateway.contenders import started
from preble_sgl.machine import default_model
from preble_sgl.profiles import load_profile
from preble_sgl.runtime_ext.emulated.config import EmulatedConfig
from preble_sgl.runtime_ext.emulated.launch import launch_emulated
from preble_sgl.runtime_ext.ports import free_ports
from preble_sgl.sim.engine_config import EngineConfig

NUM_RUNTIMES, NUM_TOOLS, NUM_AGENTS, LAST_S = 8, 12, 40, 12.0
WORDS = ("river", "stone", "green", "paper", "music", "light", "train", "house", "water", "bread")


async def agent(session: aiohttp.ClientSession, url: str, tools: list[str], rng: random.Random) -> None:
    """Talk to a tool for a few turns, then to another, until cancelled."""
    while True:
        messages = [{"role": "system", "content": rng.choice(tools)}]
        for _ in range(rng.randint(2, 6)):
            messages.append({"role": "user", "content": " ".join(rng.choices(WORDS, k=40))})
            body = {"messages": messages, "max_tokens": rng.randint(20, 120)}
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                messages.append((await answer.json())["choices"][0]["message"])
            await asyncio.sleep(rng.uniform(0.1, 1.0))


async def shoot(out: Path) -> None:
    """Serve, load, look."""
    from playwright.async_api import async_playwright

    rng, model, profile = random.Random(0), default_model(), load_profile("h100-llama3-8b")
    tools = [" ".join(rng.choices(WORDS, k=rng.randint(150, 600))) for _ in range(NUM_TOOLS)]
    engine = EngineConfig(step=profile.step, kv_tokens=20_000, chunk_tokens=profile.chunk_tokens)
    one = EmulatedConfig(engine=engine, profile=profile.name, model_path=str(model))
    ports = free_ports(())
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(launch_emulated([one] * NUM_RUNTIMES, [0] * NUM_RUNTIMES))
        port = next(ports)
        url = f"http://127.0.0.1:{port}"
        attach = [part for each in running for part in ("--attach", each.url)]
        command = ["preble-sgl", "serve", "--model-path", str(model), "--port", str(port), *attach]
        await stack.enter_async_context(started(command, f"{url}/ready"))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        agents = [
            asyncio.create_task(agent(session, url, tools, random.Random(seed))) for seed in range(NUM_AGENTS)
        ]
        browser_path = shutil.which("chromium")
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1200, "height": 1250})
        await page.goto(f"{url}/ui")
        await asyncio.sleep(LAST_S)
        await page.screenshot(path=out)
        await browser.close()
        for task in agents:
            task.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


def main(
    out: Annotated[Path, typer.Option("--out", help="Where the picture goes.")] = Path("docs/live.png"),
) -> None:
    """Take the picture."""
    asyncio.run(shoot(out))


if __name__ == "__main__":
    typer.run(main)
