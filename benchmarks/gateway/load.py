"""A closed loop of clients that do as little as a client can: write a request, read until its answer ends."""

import asyncio
import random
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import urlsplit

import orjson

WORDS = ("river", "stone", "green", "paper", "music", "light", "train", "house", "water", "bread")
END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one round gave. Latencies in seconds, one per request; `took_s` for all of them."""

    latencies: list[float]
    took_s: float
    num_chunks: int


def bodies(model: str, num: int, streams: bool, seed: int) -> list[bytes]:
    """Return chats that share one of four system prompts of 150 words and ask 30 words of their own."""
    rng = random.Random(seed)
    systems = [" ".join(rng.choices(WORDS, k=150)) for _ in range(4)]
    return [
        orjson.dumps(
            {
                "model": model,
                "stream": streams,
                "max_tokens": 64,
                "messages": [
                    {"role": "system", "content": rng.choice(systems)},
                    {"role": "user", "content": " ".join(rng.choices(WORDS, k=30))},
                ],
            }
        )
        for _ in range(num)
    ]


async def measure(url: str, asked: list[bytes], num_clients: int) -> Measured:
    """Ask everything over `num_clients` connections that stay open. Raises RuntimeError for a bad answer."""
    waiting = iter(asked)
    latencies: list[float] = []
    num_chunks = 0

    async def client() -> None:
        nonlocal num_chunks
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**20)
        for body in waiting:
            began_at = perf_counter()
            writer.write(_head(parts.netloc, len(body)) + body)
            found = await _read_answer(reader)
            num_chunks += found
            latencies.append(perf_counter() - began_at)
        writer.close()

    began_at = perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return Measured(latencies, perf_counter() - began_at, num_chunks)


def _head(host: str, size: int) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {size}\r\n\r\n"
    ).encode()


async def _read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer to its end; return how many events it had."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(f"not an answer: {head.decode(errors='replace')}")
    if b"content-length: " in head:
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
        return 0
    num_events, tail = 0, b""
    while not tail.endswith(END_OF_CHUNKS):
        data = await reader.read(2**18)
        if not data:
            raise RuntimeError("the answer broke off")
        num_events += data.count(b"data: ")
        tail = (tail + data)[-len(END_OF_CHUNKS) :]
    return num_events
