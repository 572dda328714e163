"""Types to JSON schemas, and generated texts back to values; a thin layer over pydantic."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from preble_sgl.errors import OutputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def json_schema_of(type_: Any) -> str | None:
    """Return the JSON schema that constrains the output, or None for `str` (free text)."""
    return None if type_ is str else _schema(type_)


def checked_schema(schema: dict[str, Any]) -> str:
    """Return a schema that a user wrote as text. Raises ValueError when it is no JSON object."""
    try:
        return orjson.dumps(schema).decode()
    except orjson.JSONEncodeError as error:
        raise ValueError(f"gen: the JSON schema is not JSON ({error})") from None


def parse(type_: Any, text: str) -> Any:
    """Turn a generated text into a value of `type_`. Raises OutputError with the text's end if it cannot."""
    if type_ is str:
        return text
    from pydantic import ValidationError

    try:
        return _adapter(type_).validate_json(text)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        name = getattr(type_, "__name__", repr(type_))
        raise OutputError(
            f"the generated text is not a valid {name} ({what}); it ends in {text[-60:]!r}. "
            "If it was cut off, raise max_tokens or bound the fields (max_length)"
        ) from error


@lru_cache(maxsize=256)
def _schema(type_: Any) -> str:
    return orjson.dumps(_adapter(type_).json_schema()).decode()


@lru_cache(maxsize=256)
def _adapter(type_: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(type_)
