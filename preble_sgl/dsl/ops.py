"""The closed set of things a program can say: text, messages, `gen` and `select`. All are values."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Unpack, overload

from preble_sgl.core import FinishReason, SamplingParams, TokenLogprob, Usage
from preble_sgl.dsl.holes import has_marker
from preble_sgl.dsl.schema import checked_schema, json_schema_of

if TYPE_CHECKING:
    from preble_sgl.dsl.tools import Tool

T = TypeVar("T")
Item = TypeVar("Item")
Role = Literal["system", "user", "assistant", "tool"]
ScoreRule = Literal["mean_logprob", "sum_logprob", "vs_prior"]

_REGEX_SIGNS = re.compile(r"[\\.^$|?*+(){}\[\]]")


@dataclass(frozen=True, slots=True)
class Part:
    """A message of one role, or plain text outside any message (`role=None`)."""

    role: Role | None
    text: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What `system`, `user` and `assistant` return; prompts and strings are joined with `+`."""

    parts: tuple[Part, ...]

    @cached_property
    def has_hole(self) -> bool:
        """Whether a text in it is not known yet, because it is generated."""
        return any(has_marker(part.text) for part in self.parts)

    @cached_property
    def _hash(self) -> int:
        return hash(self.parts)

    def __hash__(self) -> int:
        return self._hash  # demonstrations are hashed once, not for every row

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


def system(text: str, *, tools: Sequence["Tool[..., Any]"] = ()) -> Prompt:
    """Return a system message, followed by what a model has to know of `tools` to call them in `s.act`."""
    from preble_sgl.dsl.tools import describe

    return Prompt((Part("system", _plain(text) + (describe(tools) if tools else "")),))


def user(text: str, *, images: Sequence[str] = ()) -> Prompt:
    """Return a user message. `images` stand before the text: each a URL, a file's path or base64 data.

    A file must be readable by the runtime. The model's chat template must know images.
    """
    return Prompt((Part("user", _plain(text), tuple(images)),))


def assistant(text: str) -> Prompt:
    """Return an assistant message that is already written, such as a few-shot answer."""
    return Prompt((Part("assistant", _plain(text)),))


def few_shot(demos: Iterable[Item], render: Callable[[Item], Prompt], *, k: int | None = None) -> Prompt:
    """Return the first `k` demonstrations (all, if None) as messages, in the order given.

    Rows share what is the same and in the same order, so give every row the same demonstrations; a plan
    shows what it costs not to. Raises ValueError when there are fewer than `k`.
    """
    chosen = list(demos)[:k]
    if k is not None and len(chosen) < k:
        raise ValueError(f"few_shot: {k} demonstrations asked for, but there are {len(chosen)}")
    return Prompt(tuple(part for demo in chosen for part in render(demo).parts))


class GenOptions(TypedDict, total=False):
    """Options of `gen`: what the runtime's sampler understands, a name, and a deadline."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    frequency_penalty: float
    presence_penalty: float
    stop: str | Sequence[str]
    regex: str
    choices: Sequence[str]
    seed: int
    ignore_eos: bool
    logprobs: int
    name: str
    timeout_s: float


_OURS = frozenset({"max_tokens", "stop", "choices", "logprobs", "name", "timeout_s"})


@dataclass(frozen=True, slots=True)
class Gen(Generic[T]):
    """A generation to be run: its result type and how to sample it.

    `schema`: set when the result is described by a JSON schema instead of a type. `choices`: the texts
    that it is limited to, if it is. `timeout_s`: seconds that it may take.
    """

    type_: Any
    params: SamplingParams
    schema: str | None = None
    choices: tuple[str, ...] = ()
    num_top_logprobs: int | None = None
    name: str | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Generation(Generic[T]):
    """All that came of one `gen`: the value, the text that it was read from, and how it ended.

    `logprobs`: one entry per generated token, if asked for with `logprobs=k`.
    """

    value: T
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()


@overload
def gen(**options: Unpack[GenOptions]) -> Gen[str]: ...
@overload
def gen(type_: type[T], **options: Unpack[GenOptions]) -> Gen[T]: ...
@overload
def gen(type_: Any, **options: Unpack[GenOptions]) -> Gen[Any]: ...
def gen(type_: Any = str, **options: Unpack[GenOptions]) -> Gen[Any]:
    """Describe a generation, to be run with `await s.gen(...)`.

    `type_` is `str`, anything pydantic understands (a model, `int`, `list[str]`, `Literal[...]`), or a JSON
    schema as a dict: the output is then constrained to the schema and comes back validated. Options:

    - `max_tokens` (128): most tokens to generate. `temperature` (0.0): 0 is greedy.
    - `top_p`, `top_k`, `min_p`, `frequency_penalty`, `presence_penalty`: as SGLang takes them.
    - `stop`: a string or strings that end the text; they are not part of the result.
    - `regex`: constrain the text; only with `type_=str`.
    - `choices`: constrain the text to one of these, token by token; `select` weighs whole choices instead.
    - `seed`: what a sampled text is drawn with; by default it comes from the run's seed and the call's path.
    - `ignore_eos`: always generate `max_tokens` tokens.
    - `logprobs`: report each token's log-probability and so many alternatives; see `s.generate`.
    - `name`: what the call is called in plans, events and scripts (default: `call0`, `call1`, ...).
    - `timeout_s`: seconds after which the call is aborted with DeadlineError.

    Raises ValueError when an option is out of range or contradicts another.
    """
    schema = checked_schema(type_) if isinstance(type_, dict) else json_schema_of(type_)
    choices = tuple(options.get("choices", ()))
    return Gen(
        Any if isinstance(type_, dict) else type_,
        _sampling_params(schema, choices, options),
        schema if isinstance(type_, dict) else None,
        choices,
        options.get("logprobs"),
        options.get("name"),
        options.get("timeout_s"),
    )


def _sampling_params(schema: str | None, choices: tuple[str, ...], options: GenOptions) -> SamplingParams:
    given: dict[str, Any] = {key: value for key, value in options.items() if key not in _OURS}
    if unknown := sorted(set(given) - set(GenOptions.__annotations__)):
        known = ", ".join(GenOptions.__annotations__)
        raise ValueError(f"gen does not know {', '.join(unknown)}; it takes {known}")
    if "max_tokens" in options:
        given["max_new_tokens"] = options["max_tokens"]
    if "stop" in options:
        stop = options["stop"]
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "choices" in options:
        if "regex" in given or schema is not None:
            raise ValueError("give one of type, regex and choices")
        given["regex"] = _one_of(checked_choices(choices))
    return SamplingParams(**given, json_schema=schema)


def _one_of(choices: Sequence[str]) -> str:
    """Return a regex for one of the texts, in the syntax that all grammar backends share."""
    return "(" + "|".join(_REGEX_SIGNS.sub(r"\\\g<0>", choice) for choice in choices) + ")"


def checked_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """Return the choices. Raises ValueError when there is none, an empty or a repeated one."""
    if isinstance(choices, str) or not choices or not all(choices) or len(set(choices)) != len(choices):
        raise ValueError(f"choices must be distinct, non-empty texts, not {choices!r}")
    return tuple(choices)


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
    def index(self) -> int:
        """Return the place of the value among the choices."""
        return self.choices.index(self.value)

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
    name: str | None = None


def select(choices: Sequence[str], *, rule: ScoreRule = "mean_logprob", name: str | None = None) -> Select:
    """Describe a choice by log-probability, to be run with `await s.select(...)`.

    Each choice is scored as a continuation of the prompt: `sum_logprob` adds the log-probabilities of
    its tokens; `mean_logprob` divides that by their number, so that long choices are not punished;
    `vs_prior` subtracts from it the mean that the choice has without the prompt, so that texts that are
    likely anywhere are not favoured. Ties go to the earlier choice.
    Raises ValueError when there is no choice, an empty or a repeated one.
    """
    return Select(checked_choices(choices), rule, name)
