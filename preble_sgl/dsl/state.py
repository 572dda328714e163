"""The state a program works on: a growing conversation, and the calls made from it.

A state does not know whether it runs or is being read: it hands each call to its interpreter. Two exist:
`interpreter.Runner` asks a backend, `tracer.Tracer` invents symbolic answers.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, TypeVar, Unpack, overload

from preble_sgl.core import Completion, ProgramId, Request, SamplingParams, TokenIds, new_request_id
from preble_sgl.dsl.chat import Conversation, Message
from preble_sgl.dsl.ops import Gen, GenOptions, Prompt, ScoreRule, Select, Selection, as_prompt
from preble_sgl.dsl.ops import gen as make_gen
from preble_sgl.dsl.ops import select as make_select

T = TypeVar("T")
Item = TypeVar("Item")
Pending: TypeAlias = Coroutine[Any, Any, T]

_PACKAGE = str(Path(__file__).parent.parent)


class Interpreter(Protocol):
    """What gives a call its answer."""

    @property
    def program_id(self) -> ProgramId:
        """Identity of this program run."""
        ...

    async def complete(self, request: Request, state: "State") -> Completion:
        """Answer one request made from `state`."""
        ...

    def branches_done(self, num_tokens: int) -> None:
        """Learn that `num_tokens` tokens of branches that have joined are not used again."""
        ...

    def value(self, type_: Any, completion: Completion) -> Any:
        """Turn a completion into a value of the declared type."""
        ...

    def selection(self, choices: tuple[str, ...], scores: tuple[float, ...]) -> Selection:
        """Pick among scored choices."""
        ...


class State:
    """One branch of a running program. Add text with `+=`, then await `gen`, `ask`, `select` or `map`."""

    def __init__(self, interpreter: Interpreter, conversation: Conversation, path: str) -> None:
        self._interpreter = interpreter
        self._conversation = conversation
        self._path = path
        self._depth = 0
        self._num_calls = 0
        self._num_forks = 0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat so far: `{"role", "content"}` each, generated answers included."""
        return self._conversation.messages

    @property
    def conversation(self) -> Conversation:
        """The exact token ids so far, and where each stretch comes from."""
        return self._conversation

    @property
    def depth(self) -> int:
        """How many calls this branch waited for so far, one after the other."""
        return self._depth

    def __iadd__(self, prompt: Prompt | str) -> Self:
        self._conversation.add(as_prompt(prompt), _caller())
        return self

    @overload
    def gen(self, what: Gen[T], /) -> Pending[T]: ...
    @overload
    def gen(self, /, **options: Unpack[GenOptions]) -> Pending[str]: ...
    @overload
    def gen(self, what: type[T], /, **options: Unpack[GenOptions]) -> Pending[T]: ...
    @overload
    def gen(self, what: Any, /, **options: Unpack[GenOptions]) -> Pending[Any]: ...
    def gen(self, what: Any = str, /, **options: Unpack[GenOptions]) -> Pending[Any]:
        """Generate; await the result. Takes a type and options as `ps.gen` does, or a ready `ps.gen(...)`."""
        op = what if isinstance(what, Gen) else make_gen(what, **options)
        return self._gen(op, _caller())

    @overload
    def ask(self, prompt: Prompt, what: Gen[T], /) -> Pending[T]: ...
    @overload
    def ask(self, prompt: Prompt, /, **options: Unpack[GenOptions]) -> Pending[str]: ...
    @overload
    def ask(self, prompt: Prompt, what: type[T], /, **options: Unpack[GenOptions]) -> Pending[T]: ...
    @overload
    def ask(self, prompt: Prompt, what: Any, /, **options: Unpack[GenOptions]) -> Pending[Any]: ...
    def ask(self, prompt: Prompt, what: Any = str, /, **options: Unpack[GenOptions]) -> Pending[Any]:
        """Add `prompt`, then generate: `s += prompt` and `await s.gen(...)` in one expression."""
        self += prompt
        return self.gen(what, **options)

    def select(self, choices: Iterable[str], *, rule: ScoreRule = "mean_logprob") -> Pending[Selection]:
        """Let the model choose among fixed texts by log-probability; see `ps.select`."""
        return self._select(make_select(tuple(choices), rule=rule), _caller())

    def fork(self, n: int) -> list["State"]:
        """Return `n` independent branches that continue from here and share everything so far."""
        if n < 1:
            raise ValueError(f"fork({n}): at least one branch is needed")
        path = f"{self._path}/fork{self._num_forks}"
        self._num_forks += 1
        return [self._branch(f"{path}.{i}") for i in range(n)]

    async def map(self, items: Iterable[Item], fn: Callable[["State", Item], Awaitable[T]]) -> list[T]:
        """Fork once per item, run `fn(branch, item)` on all at once, and return the results in order.

        The first error cancels the other branches and is raised.
        """
        todo = list(items)
        branches = self.fork(len(todo)) if todo else []
        results = await _gather([fn(branch, item) for branch, item in zip(branches, todo, strict=True)])
        self._join(branches)
        return results

    def _join(self, branches: list["State"]) -> None:
        """Go on from where the longest branch ended; what only the branches had is not used again."""
        self._depth = max((branch.depth for branch in branches), default=self._depth)
        shared_len = len(self._conversation.ids)
        self._interpreter.branches_done(sum(len(b.conversation.ids) - shared_len for b in branches))

    def _branch(self, path: str) -> "State":
        branch = State(self._interpreter, self._conversation.fork(), path)
        branch._depth = self._depth
        return branch

    async def _gen(self, op: Gen[Any], label: str) -> Any:
        self._conversation.open_answer(label)
        request = self._request(self._conversation.ids[:], op.params)
        completion = await self._interpreter.complete(request, self)
        self._depth += 1
        self._conversation.close_answer(completion.output_ids, completion.text, label)
        return self._interpreter.value(op.type_, completion)

    async def _select(self, op: Select, label: str) -> Selection:
        self._conversation.open_answer(label)
        texts = [self._conversation.encode(choice) for choice in op.choices]
        scored = await _gather([self._score(ids) for ids in texts])
        self._depth += 1
        means = op.rule == "mean_logprob"
        scores = tuple(sum(logprobs) / (len(logprobs) if means else 1) for logprobs in scored)
        selection = self._interpreter.selection(op.choices, scores)
        chosen = self._conversation.encode(selection.value)
        self._conversation.close_answer(chosen, selection.value, label)
        return selection

    async def _score(self, choice: TokenIds) -> tuple[float, ...]:
        context = self._conversation.ids
        request = self._request(context + choice, SamplingParams(max_new_tokens=0), score_from=len(context))
        return (await self._interpreter.complete(request, self)).logprobs

    def _request(self, prompt: TokenIds, sampling: SamplingParams, score_from: int | None = None) -> Request:
        self._num_calls += 1
        return Request(
            request_id=new_request_id(),
            program_id=self._interpreter.program_id,
            call_path=f"{self._path}/call{self._num_calls - 1}",
            prompt=prompt,
            sampling=sampling,
            score_from=score_from,
        )


async def _gather(awaitables: list[Awaitable[T]]) -> list[T]:
    """Await all at once; the first error cancels the rest and is raised as itself."""

    async def as_coroutine(awaitable: Awaitable[T]) -> T:
        return await awaitable

    first_error: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(as_coroutine(awaitable)) for awaitable in awaitables]
    except BaseExceptionGroup as errors:
        first_error = errors.exceptions[0]
    if first_error is not None:
        raise first_error
    return [task.result() for task in tasks]


def _caller() -> str:
    """Return `file:line` of the innermost frame outside this package: where the user wrote the operation."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
