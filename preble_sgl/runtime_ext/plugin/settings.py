"""What the launcher tells the plugin, through the environment of SGLang's processes."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from preble_sgl.sim.wait_queue import WaitOrder

AttentionBackend = Literal["torch_native", "flashinfer"]
NAME = "preble_sgl"
SETTINGS_VARIABLE = "PREBLE_SGL_PLUGIN"
ALLOW_LIST_VARIABLE = "SGLANG_PLUGINS"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginSettings:
    """`order` of the wait queue; `max_pinned_share`: of the KV cache that pins may hold together.

    `shared_prefix`: in whose place attention reads a prefix once for all that share it; None: nowhere.
    """

    order: WaitOrder = "lpm"
    max_pinned_share: float = 0.3
    shared_prefix: AttentionBackend | None = None

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the variables to set. Other plugins stay as they are; a list of allowed ones gets ours."""
        variables = {SETTINGS_VARIABLE: json.dumps(asdict(self))}
        allowed = [name.strip() for name in inherited.get(ALLOW_LIST_VARIABLE, "").split(",") if name.strip()]
        if allowed and NAME not in allowed:
            variables[ALLOW_LIST_VARIABLE] = ",".join([*allowed, NAME])
        return variables


def from_environment(environment: Mapping[str, str]) -> PluginSettings | None:
    """Return what the launcher said; None in a server that it did not start."""
    told = environment.get(SETTINGS_VARIABLE)
    return None if told is None else PluginSettings(**json.loads(told))
