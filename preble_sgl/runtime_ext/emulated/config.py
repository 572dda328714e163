"""What an emulated runtime is told to be, and the JSON in which a child process is told."""

from dataclasses import dataclass
from typing import Any, Self

import orjson

from preble_sgl.errors import InputError
from preble_sgl.runtime_ext.ports import WILDCARDS
from preble_sgl.sim.engine_config import EngineConfig
from preble_sgl.sim.step_cost import StepCost

SGLANG_VERSION = "0.5.23"
"""Whose API and behaviour is emulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEventsConfig:
    """SGLang's `--kv-events-config`: where cache events are published. Endpoints as ZeroMQ writes them.

    A wildcard host stands for loopback here. `bind=None`: bind a wildcard, connect to anything else.
    """

    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    bind: bool | None = None
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    topic: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the flag's JSON; fields that only matter inside SGLang are ignored. Raises InputError."""
        try:
            given = orjson.loads(text)
            config = cls(**{name: value for name, value in given.items() if name in cls.__slots__})
        except (orjson.JSONDecodeError, AttributeError, TypeError) as error:
            raise InputError(f"kv-events-config {text}: not a JSON object ({error})") from None
        if config.publisher not in ("null", "zmq"):
            raise InputError(f"kv-events-config: publisher {config.publisher!r}: give zmq, or null for none")
        return config

    @property
    def binds(self) -> bool:
        """Whether the publisher's socket waits for subscribers (true) or connects to one."""
        if self.bind is not None:
            return self.bind
        return any(host in self.endpoint for host in WILDCARDS) or self.endpoint.startswith("ipc://")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedConfig:
    """One emulated runtime.

    `profile`: name of the cost profile in `engine.step`, for people to see. `overhead_s`: what a request
    waits outside the engine. `model_path`: where tokenizer and chat template come from; without one, text is
    cut into made-up tokens. `incremental`: streams of `/generate` carry only what is new, as with SGLang's
    `--incremental-streaming-output`.
    """

    engine: EngineConfig
    profile: str
    overhead_s: float = 0.0
    model_path: str | None = None
    device: str = "cuda"
    incremental: bool = False
    kv_events: KvEventsConfig | None = None

    def __post_init__(self) -> None:
        if self.kv_events and self.kv_events.publisher != "null" and self.engine.publish_every is None:
            raise InputError(
                "kv_events: the engine tells no cache events; set its publish_every (SGLang: 40)"
            )

    @property
    def served_name(self) -> str:
        """The name under which the model is served: its path, or one that says what this is."""
        return self.model_path or f"emulated/{self.profile}"

    def to_json(self) -> bytes:
        """Return all of it as one line."""
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = orjson.loads(line)
        engine, events = fields.pop("engine"), fields.pop("kv_events")
        step = StepCost(**engine.pop("step"))
        return cls(
            engine=EngineConfig(step=step, **engine),
            kv_events=KvEventsConfig(**events) if events else None,
            **fields,
        )
