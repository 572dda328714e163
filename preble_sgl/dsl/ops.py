"""The closed set of things a program can say: text, messages, `gen` and `select`. All are values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack, overload

from preble_sgl.core import SamplingParams
from preble_sgl.dsl.schema import json_schema_of

T = TypeVar("T")
Role = Literal["system", "user", "assistant"]
ScoreRule = Literal["mean_logprob", "sum_logprob"]


@dataclass(frozen=True, slots=True)
class Part:
    """A message of one role, or plain text outside any message (`role=None`)."""

    role: Role | None
    text: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What `system`, `user` and `assistant` return; prompts and strings are joined with `+`."""

    parts: tuple[Part, ...]

    def __add__(self, other: "Prompt | str") -> "Prompt":
        return Prompt(self.parts + as_prompt(other).parts)

    def __radd__(self, other: str) -> "Prompt":
        return Prompt(as_prompt(other).parts + self.parts)


def as_prompt(value: Prompt | str) -> Prompt:
    """Take a plain string as text outside any message."""
    if isinstance(value, Prompt):
        return value
    if isinstance(value, str):
        return Prompt((Part(None, _plain(value)),))
    raise TypeError(f"cannot add {type(value).__name__} to a program's state: give a str or ps.user(...)")


def _plain(text: str) -> str:
    """Return `text` as an exact str, so that no template can trip over a symbolic one."""
    if not isinstance(text, str):
        raise TypeError(f'a message takes a str, not {type(text).__name__}: write it as f"{{value}}"')
    return str.__str__(text)


def system(text: str) -> Prompt:
    """Return a system message."""
    return Prompt((Part("system", _plain(text)),))


def user(text: str) -> Prompt:
    """Return a user message."""
    return Prompt((Part("user", _plain(text)),))


def assistant(text: str) -> Prompt:
    """Return an assistant message that is already written, such as a few-shot answer."""
    return Prompt((Part("assistant", _plain(text)),))


class GenOptions(TypedDict, total=False):
    """Options of `gen`: what the runtime's sampler understands, and nothing else."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    stop: str | Sequence[str]
    regex: str
    seed: int
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Gen(Generic[T]):
    """A generation to be run: its result type and how to sample it."""

    type_: Any
    params: SamplingParams


@overload
def gen(**options: Unpack[GenOptions]) -> Gen[str]: ...
@overload
def gen(type_: type[T], **options: Unpack[GenOptions]) -> Gen[T]: ...
@overload
def gen(type_: Any, **options: Unpack[GenOptions]) -> Gen[Any]: ...
def gen(type_: Any = str, **options: Unpack[GenOptions]) -> Gen[Any]:
    """Describe a generation, to be run with `await s.gen(...)`.

    `type_` is `str` or anything pydantic understands (a model, `int`, `list[str]`, `Literal[...]`):
    the output is then constrained to its JSON schema and comes back validated. Options:

    - `max_tokens` (128): most tokens to generate. `temperature` (0.0): 0 is greedy.
    - `top_p`, `top_k`, `min_p`, `frequency_penalty`, `presence_penalty`, `seed`: as SGLang takes them.
    - `stop`: a string or strings that end the text; they are not part of the result.
    - `regex`: constrain the text; only with `type_=str`.
    - `ignore_eos`: always generate `max_tokens` tokens.

    Raises ValueError when an option is out of range or contradicts another.
    """
    return Gen(type_, _sampling_params(type_, options))


def _sampling_params(type_: Any, options: GenOptions) -> SamplingParams:
    given: dict[str, Any] = dict(options)
    if "max_tokens" in given:
        given["max_new_tokens"] = given.pop("max_tokens")
    if "stop" in given:
        given["stop"] = (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
    try:
        return SamplingParams(**given, json_schema=json_schema_of(type_))
    except TypeError:
        known = ", ".join(GenOptions.__annotations__)
        unknown = ", ".join(sorted(set(options) - set(GenOptions.__annotations__)))
        raise ValueError(f"gen does not know {unknown}; it takes {known}") from None


@dataclass(frozen=True, slots=True)
class Selection:
    """The outcome of `select`.

    `scores` holds one score per choice in the order given, by the rule that was asked for; higher is
    better. `margin` is the lead of the best over the second best score.
    """

    value: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def margin(self) -> float:
        """Return the distance between the two best scores, 0.0 for a single choice."""
        best = sorted(self.scores, reverse=True)
        return best[0] - best[1] if len(best) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Select:
    """A choice to be made by the model among fixed texts."""

    choices: tuple[str, ...]
    rule: ScoreRule


def select(choices: Sequence[str], *, rule: ScoreRule = "mean_logprob") -> Select:
    """Describe a choice by log-probability, to be run with `await s.select(...)`.

    Each choice is scored as a continuation of the prompt: `sum_logprob` adds the log-probabilities of
    its tokens, `mean_logprob` divides that by their number, so that long choices are not punished.
    Ties go to the earlier choice. Raises ValueError when there is no choice, an empty or a repeated one.
    """
    if not choices or not all(choices) or len(set(choices)) != len(choices):
        raise ValueError(f"select needs distinct, non-empty choices, not {list(choices)!r}")
    return Select(tuple(choices), rule)
