"""Tools: Python functions that a model may call, and the turns in which it does.

A turn is one generation that is either calls of tools or the final answer. Its grammar allows both: a
grammar of the final answer alone would never let a tool be called.
"""

import asyncio
import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

import orjson

from preble_sgl.dsl.decisions import is_tracing, new_hole
from preble_sgl.dsl.holes import Hole
from preble_sgl.errors import ToolError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from preble_sgl.dsl.ops import Gen, GenOptions, Prompt

P = ParamSpec("P")
T = TypeVar("T")

RESULT_LEN = 1024
"""Tokens of a tool's result that a model gets to see, unless the tool says otherwise."""

_INSTRUCTIONS = (
    '\n\nYou can call tools. To call one, answer {"calls": [{"tool": NAME, "arguments": {...}}]} and you '
    'will be shown what it returns. To end, answer {"final": ...}. The tools:\n'
)


class Tool(Generic[P, T]):
    """A function that a model may call: its name, its docstring, and a schema of its arguments."""

    def __init__(
        self,
        fn: Callable[P, T | Awaitable[T]],
        *,
        timeout_s: float | None = None,
        retries: int = 0,
        max_len: int = RESULT_LEN,
    ) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self.name = fn.__name__
        self.description = inspect.getdoc(fn) or ""
        self.timeout_s = timeout_s
        self.retries = retries
        self.max_len = max_len
        if not self.description:
            raise TypeError(f"@tool: {self.name} needs a docstring: it is what the model knows of it")

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function. While a plan is made it is not called: the result is a hole."""
        if is_tracing():
            return Hole(new_hole(self.name, self.max_len))  # type: ignore[return-value]
        if inspect.iscoroutinefunction(self._fn):
            return await self._fn(*args, **kwargs)  # type: ignore[no-any-return]
        return await asyncio.to_thread(self._fn, *args, **kwargs)  # type: ignore[arg-type]

    async def result(self, arguments: Mapping[str, Any]) -> Any:
        """Call with arguments as a model wrote them, again up to `retries` times when it fails.

        Raises ToolError when it fails for good or takes longer than `timeout_s` seconds.
        """
        for attempt in range(self.retries + 1):
            try:
                checked = self._arguments.model_validate(arguments)
                given = {name: getattr(checked, name) for name in type(checked).model_fields}
                async with asyncio.timeout(self.timeout_s):
                    return await self(**given)  # type: ignore[call-arg]
            except Exception as error:
                if attempt == self.retries:
                    raise ToolError(f"{self.name}: {_told(error, self.timeout_s)}") from error
        raise AssertionError("the last attempt returns or raises")

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        schema = self._arguments.model_json_schema()
        schema.pop("title", None)
        return schema

    @functools.cached_property
    def _arguments(self) -> "type[BaseModel]":
        """A pydantic model of the function's parameters."""
        from pydantic import ConfigDict, create_model

        fields: dict[str, Any] = {}
        for name, parameter in inspect.signature(self._fn, eval_str=True).parameters.items():
            if parameter.annotation is parameter.empty:
                raise TypeError(f"@tool: parameter {name} of {self.name} needs a type")
            fields[name] = (
                parameter.annotation,
                ... if parameter.default is parameter.empty else parameter.default,
            )
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)


@overload
def tool(fn: Callable[P, Awaitable[T]], /) -> Tool[P, T]: ...
@overload
def tool(fn: Callable[P, T], /) -> Tool[P, T]: ...
@overload
def tool(
    *, timeout_s: float | None = None, retries: int = 0, max_len: int = RESULT_LEN
) -> Callable[[Callable[P, Any]], Tool[P, Any]]: ...
def tool(fn: Any = None, /, **options: Any) -> Any:
    """Turn a function into a tool: its signature is the schema, its docstring the description.

    It may be async or not (then it runs in a thread). Options: `timeout_s`, seconds that one call may take;
    `retries`, how often a failed call is tried again; `max_len`, tokens of the result that the model sees.
    While a plan is made the function is not called. Raises TypeError without a docstring or types.
    """
    return Tool(fn, **options) if fn is not None else lambda decorated: Tool(decorated, **options)


def effect(fn: Callable[P, T]) -> Callable[P, T | None]:
    """Mark a function that does something to the world: while a plan is made it is not called.

    It returns None then. Write `async` ones as tools.
    """

    @functools.wraps(fn)
    def unless_tracing(*args: P.args, **kwargs: P.kwargs) -> T | None:
        return None if is_tracing() else fn(*args, **kwargs)

    return unless_tracing


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that a model asks for."""

    tool: Tool[..., Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn(Generic[T]):
    """What a model decided to do: `calls` to make, or, if there are none, its `final` answer."""

    calls: tuple[ToolCall, ...]
    final: T | None


def describe(tools: Sequence[Tool[..., Any]]) -> str:
    """Return what a model has to know to call the tools."""
    lines = [
        f"- {t.name}: {_one_line(t.description)} Arguments: {orjson.dumps(t.schema).decode()}" for t in tools
    ]
    return _INSTRUCTIONS + "\n".join(lines)


def act_op(tools: Sequence[Tool[..., Any]], final: Any, max_calls: int, options: "GenOptions") -> "Gen[Any]":
    """Return the generation of a turn. Raises ValueError without tools, or with two of one name."""
    from pydantic import TypeAdapter

    from preble_sgl.dsl.ops import gen

    names = [t.name for t in tools]
    if not names or len(set(names)) != len(names) or max_calls < 1:
        raise ValueError(
            f"act needs tools of different names and max_calls of at least 1, not {names}, {max_calls}"
        )
    definitions: dict[str, Any] = {}
    calls = [_call_schema(t, definitions) for t in tools]
    answer = _lifted(TypeAdapter(final).json_schema(), "final", definitions)
    schema = {
        "anyOf": [
            _object(calls={"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": max_calls}),
            _object(final=answer),
        ],
        "$defs": definitions,
    }
    return gen(schema, **options)


def read_turn(value: Any, tools: Sequence[Tool[..., Any]], final: Any) -> Turn[Any]:
    """Return the turn that a generated JSON object describes."""
    from pydantic import TypeAdapter

    if "final" in value:
        return Turn((), TypeAdapter(final).validate_python(value["final"]))
    by_name = {t.name: t for t in tools}
    return Turn(tuple(ToolCall(by_name[c["tool"]], c["arguments"]) for c in value["calls"]), None)


def results_prompt(calls: Sequence[ToolCall], results: Sequence[str]) -> "Prompt":
    """Return the results of tools as messages."""
    from preble_sgl.dsl.ops import Part, Prompt

    return Prompt(tuple(Part("tool", str.__str__(result)) for result in results))


def _object(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}


def _call_schema(t: Tool[..., Any], definitions: dict[str, Any]) -> dict[str, Any]:
    return _object(tool={"const": t.name, "type": "string"}, arguments=_lifted(t.schema, t.name, definitions))


def _lifted(schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> Any:
    """Move a schema's definitions to the top of another, under names that cannot clash."""
    inner = schema.pop("$defs", {})
    text = orjson.dumps([schema, inner]).decode()
    renamed, moved = orjson.loads(re.sub(r"#/\$defs/", f"#/$defs/{prefix}.", text))
    definitions |= {f"{prefix}.{name}": value for name, value in moved.items()}
    return renamed


def _told(error: Exception, timeout_s: float | None) -> str:
    """Return what went wrong, as one line."""
    if isinstance(error, TimeoutError) and timeout_s is not None:
        return f"no result within {timeout_s:g} s"
    return _one_line(f"{type(error).__name__}: {error}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
