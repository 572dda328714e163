"""Cost profiles: what one kind of worker takes for its work, as data files with their source and their error.

One file serves the engine model, which needs the seconds of each iteration, and the global scheduler, which
needs the worker seconds of each request. `preble-sgl calibrate` writes such a file for any SGLang server.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from preble_sgl.errors import InputError
from preble_sgl.global_sched.cost import AttentionCost, CostProfile
from preble_sgl.sim.step_cost import StepCost

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One model on one kind of worker.

    `kv_tokens`: size of its KV cache. `chunk_tokens`: most tokens it prefills in one iteration.
    `overhead_s`: what a request waits outside the engine (HTTP, tokenising), which keeps no engine busy.
    `decode_batch`, `decode_context`: the usual decode step, of so many requests with so many tokens each; a
    request is charged its share of one. `kind`, `source` and `error` say where the figures come from and how
    far off they are.
    """

    name: str
    kind: str
    hardware: str
    model: str
    source: str
    error: str
    kv_tokens: int
    chunk_tokens: int
    step: StepCost
    overhead_s: float = 0.0
    decode_batch: int = 32
    decode_context: int = 2048

    @property
    def cost(self) -> CostProfile:
        """What the global scheduler prices work with."""
        step = self.step
        num, context = self.decode_batch, self.decode_batch * self.decode_context
        decode_s = step.decodes(1, num, context)
        longer_s = step.decodes(1, 2 * num, 2 * context) - decode_s
        return CostProfile(
            name=self.name,
            source=self.source,
            floor_s=step.floor_s + step.prefill_s,
            base_s=step.base_s + step.prefill_s,
            token_s=step.token_s,
            context_s=step.context_s,
            decode_token_s=decode_s / num,
            step_request_s=longer_s / num,
            attention=AttentionCost(
                per_new_token_s=step.attention_new_s,
                per_sequence_token_s=step.attention_sequence_s,
                per_pair_s=step.attention_pair_s,
                per_square_s=step.attention_square_s,
                min_pairs=step.min_pairs,
            ),
        )


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: str
    hardware: str
    model: str
    source: str
    error: str
    kv_tokens: PositiveInt
    chunk_tokens: PositiveInt
    overhead_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    decode_batch: PositiveInt = 32
    decode_context: PositiveInt = 2048
    step: dict[str, float]


def profile_names() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.toml"))


def load_profile(name: str | Path) -> Profile:
    """Return a profile by its name, or from a TOML file. Raises InputError for a bad name or file."""
    path = Path(name) if str(name).endswith(".toml") else _FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(profile_names())
        raise InputError(f"there is no profile {name}: give one of {known}, or a .toml file")
    try:
        checked = _File.model_validate(tomllib.loads(path.read_text()))
        step: Any = checked.step
        return Profile(name=path.stem, step=StepCost(**step), **checked.model_dump(exclude={"step"}))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError, InputError, TypeError) as error:
        raise InputError(f"profile {path}: {' '.join(str(error).split())}") from error
