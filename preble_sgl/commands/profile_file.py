"""Write a cost profile as the TOML file that `load_profile` reads."""

import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import orjson

from preble_sgl.profiles import Profile
from preble_sgl.sim.step_cost import StepCost

WIDTH = 110
REQUIRED = ("floor_s", "base_s", "token_s")


def write_profile(path: Path, profile: Profile) -> None:
    """Write the profile; its name is that of the file.

    Coefficients keep four digits; most of those that are 0 are left out.
    """
    path.write_text("\n".join(_lines(profile)) + "\n")


def _lines(profile: Profile) -> Iterator[str]:
    for name in ("kind", "hardware", "model", "source", "error"):
        yield f"{name} = {_text(getattr(profile, name))}"
    yield f"kv_tokens = {profile.kv_tokens}"
    yield f"chunk_tokens = {profile.chunk_tokens}"
    yield f"overhead_s = {profile.overhead_s:.4g}"
    yield f"decode_batch = {profile.decode_batch}"
    yield f"decode_context = {profile.decode_context}"
    yield ""
    yield "[step]"
    for field in fields(StepCost):
        value = getattr(profile.step, field.name)
        if value or field.name in REQUIRED:
            yield f"{field.name} = {value:.4g}"


def _text(value: str) -> str:
    """Return a TOML string, a long one wrapped over several lines.

    JSON's escapes are TOML's, except that TOML escapes DEL as well.
    """
    quoted = orjson.dumps(value).decode().replace("\x7f", "\\u007f")
    if len(quoted) < WIDTH - 10:
        return quoted
    lines = textwrap.fill(quoted[1:-1], WIDTH, break_long_words=False, break_on_hyphens=False)
    return f'"""\n{lines}"""'
