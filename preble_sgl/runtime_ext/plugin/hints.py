"""What a request tells the plugin, as actions of SGLang's `kv_hints`, which stock SGLang ignores.

- `preble_sgl.call {program_id, expected_output_len}`: whose call it is and how long its answer may get.
- `preble_sgl.pin {pin_id, expires_s}`: keep the KV of the prompt, for so many seconds at most.
- `preble_sgl.unpin {pin_id}`: no longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PREFIX = "preble_sgl."
VERSION = "1"


@dataclass(frozen=True, slots=True)
class CallHint:
    """Whose call a request is, and the output tokens to expect of it."""

    program_id: str
    expected_output_len: int | None = None


@dataclass(frozen=True, slots=True)
class Pin:
    """Keep the prompt's KV. A later pin of the same id takes the place of this one."""

    pin_id: str
    expires_s: float


@dataclass(frozen=True, slots=True)
class Unpin:
    """Let go of a pin; an unknown one is none."""

    pin_id: str


Hint = CallHint | Pin | Unpin
_KINDS: dict[str, type[Hint]] = {"call": CallHint, "pin": Pin, "unpin": Unpin}


class Action(Protocol):
    """SGLang's `KvHintAction`."""

    @property
    def action_type(self) -> str: ...
    @property
    def payload(self) -> dict[str, Any]: ...


def envelope(message_id: str, hints: Sequence[Hint]) -> dict[str, Any]:
    """Return the `kv_hints` of a request body."""
    actions = [
        {
            "action_id": str(number),
            "action_type": PREFIX + _name(hint),
            "action_version": VERSION,
            "payload": {name: getattr(hint, name) for name in hint.__slots__},
        }
        for number, hint in enumerate(hints)
    ]
    return {"protocol_version": VERSION, "message_id": message_id, "actions": actions}


def read_hints(actions: Sequence[Action]) -> list[Hint]:
    """Return the hints among a request's actions; what others mean for others is left out.

    Raises TypeError for a payload of ours that does not fit.
    """
    return [
        _KINDS[action.action_type.removeprefix(PREFIX)](**action.payload)
        for action in actions
        if action.action_type.removeprefix(PREFIX) in _KINDS and action.action_type.startswith(PREFIX)
    ]


def _name(hint: Hint) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(hint, kind))
