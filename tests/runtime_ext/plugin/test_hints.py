"""What the launcher and requests tell the plugin."""

from dataclasses import dataclass
from typing import Any

import pytest

from preble_sgl.runtime_ext.plugin.hints import CallHint, Hint, Pin, Unpin, envelope, read_hints
from preble_sgl.runtime_ext.plugin.hooks import on_loopback
from preble_sgl.runtime_ext.plugin.settings import PluginSettings, from_environment


@dataclass
class Action:
    """SGLang's form of an action."""

    action_type: str
    payload: dict[str, Any]


def read(hints: list[Hint], *others: Action) -> list[Hint]:
    sent = envelope("m", hints)
    assert sent["protocol_version"] == "1"
    return read_hints(
        [*others, *(Action(one["action_type"], one["payload"]) for one in sent["actions"])],
    )


def test_hints_arrive_as_they_were_given() -> None:
    hints: list[Hint] = [CallHint("program", 12), CallHint("other"), Pin("p", 2.5), Unpin("p")]
    assert read(hints) == hints


def test_what_is_meant_for_others_is_left_to_them() -> None:
    others = [Action("pin", {"pin_id": "x"}), Action("preble_sgl.dance", {}), Action("hicache.keep", {})]
    assert read([Unpin("p")], *others) == [Unpin("p")]


def test_a_payload_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(TypeError):
        read([], Action("preble_sgl.pin", {"pin": "x"}))


def test_settings_travel_through_the_environment() -> None:
    settings = PluginSettings(order="spf", max_pinned_share=0.1)
    assert from_environment(settings.environment({})) == settings


def test_a_server_that_we_did_not_start_is_told_nothing() -> None:
    assert from_environment({}) is None


@pytest.mark.parametrize(
    ("allowed", "becomes"),
    [(None, None), ("", None), ("mine", "mine,preble_sgl"), ("mine, preble_sgl", None)],
)
def test_other_plugins_stay_as_they_are_and_a_list_of_allowed_ones_gets_ours(
    allowed: str | None, becomes: str | None
) -> None:
    inherited = {} if allowed is None else {"SGLANG_PLUGINS": allowed}
    assert PluginSettings().environment(inherited).get("SGLANG_PLUGINS") == becomes


@pytest.mark.parametrize(
    ("endpoint", "bound"),
    [
        ("tcp://*:5", "tcp://127.0.0.1:5"),
        ("tcp://0.0.0.0:5", "tcp://127.0.0.1:5"),
        ("tcp://10.0.0.1:5", "tcp://10.0.0.1:5"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
    ],
)
def test_a_wildcard_address_becomes_loopback(endpoint: str, bound: str) -> None:
    assert on_loopback(endpoint) == ((bound,), {})
