"""The state a program works on: a growing conversation, and the calls made from it.

A state does not know whether it runs or is being read: it hands each call to its interpreter. Two exist:
`interpreter.Runner` asks a backend, `tracer.Tracer` invents symbolic answers.
"""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeAlias, TypeVar, Unpack, overload

from preble_sgl.core import Message, Request, SamplingParams, TokenIds, new_request_id
from preble_sgl.dsl import parse
from preble_sgl.dsl.calls import CallSite, Interpreter
from preble_sgl.dsl.conversation import Conversation
from preble_sgl.dsl.decisions import caller
from preble_sgl.dsl.ops import Gen, Generation, GenOptions, Prompt, ScoreRule, Select, Selection, as_prompt
from preble_sgl.dsl.ops import gen as make_gen
from preble_sgl.dsl.ops import select as make_select
from preble_sgl.dsl.tools import Tool, Turn, act_op, results_prompt
from preble_sgl.errors import InputError

T = TypeVar("T")
Item = TypeVar("Item")
Pending: TypeAlias = Coroutine[Any, Any, T]


@dataclass(frozen=True, slots=True)
class _Hints:
    priority: int = 0
    output_len: int | None = None


class State:
    """One branch of a running program. Add text with `+=`, then await `gen`, `ask`, `select` or `map`."""

    parse = parse

    def __init__(
        self, interpreter: Interpreter, conversation: Conversation, path: str, *, result_type: Any = str
    ) -> None:
        self._interpreter = interpreter
        self._conversation = conversation
        self._path = path
        self._result_type = result_type
        self._after: tuple[int, ...] = ()
        self._depth = 0
        self._names: dict[str, int] = {}
        self._hints = _Hints()
        self._forked_len = 0
        self._is_busy = self._is_done = False

    @property
    def messages(self) -> tuple[Message, ...]:
        """The chat so far: `{"role", "content"}` each, generated answers included."""
        return self._conversation.messages

    @property
    def conversation(self) -> Conversation:
        """The exact token ids so far, and where each stretch comes from."""
        return self._conversation

    @property
    def path(self) -> str:
        """Which branch of the run this is: `judge[3]/fork0.1` is the second branch of row 3's first fork."""
        return self._path

    @property
    def depth(self) -> int:
        """How many calls this branch waited for so far, one after the other."""
        return self._depth

    def __iadd__(self, prompt: Prompt | str) -> Self:
        self._conversation.add(as_prompt(prompt), caller())
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
        return self._value(_as_gen(what, options), caller())

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

    @overload
    def generate(self, what: Gen[T], /) -> Pending[Generation[T]]: ...
    @overload
    def generate(self, /, **options: Unpack[GenOptions]) -> Pending[Generation[str]]: ...
    @overload
    def generate(self, what: type[T], /, **options: Unpack[GenOptions]) -> Pending[Generation[T]]: ...
    @overload
    def generate(self, what: Any, /, **options: Unpack[GenOptions]) -> Pending[Generation[Any]]: ...
    def generate(self, what: Any = str, /, **options: Unpack[GenOptions]) -> Pending[Generation[Any]]:
        """Generate as `gen` does, and return all that came of it: text, usage, log-probabilities."""
        return self._generate(_as_gen(what, options), caller())

    def result(self, **options: Unpack[GenOptions]) -> Pending[Any]:
        """Generate a value of the type that the program is declared to return."""
        return self._value(make_gen(self._result_type, **options), caller())

    def select(
        self, choices: Iterable[str], *, rule: ScoreRule = "mean_logprob", name: str | None = None
    ) -> Pending[Selection]:
        """Let the model choose among fixed texts by log-probability; see `ps.select`."""
        return self._select(make_select(tuple(choices), rule=rule, name=name), caller())

    @overload
    def act(
        self, tools: Sequence[Tool[..., Any]], /, *, max_calls: int = 1, **options: Unpack[GenOptions]
    ) -> Pending[Turn[str]]: ...
    @overload
    def act(
        self,
        tools: Sequence[Tool[..., Any]],
        final: type[T],
        /,
        *,
        max_calls: int = 1,
        **options: Unpack[GenOptions],
    ) -> Pending[Turn[T]]: ...
    def act(
        self,
        tools: Sequence[Tool[..., Any]],
        final: Any = str,
        /,
        *,
        max_calls: int = 1,
        **options: Unpack[GenOptions],
    ) -> Pending[Turn[Any]]:
        """Let the model call up to `max_calls` tools or give its final answer, a value of type `final`.

        The output is constrained to one of the two, so that neither is forced. Say what the tools do with
        `ps.system(..., tools=tools)`, run the calls with `s.use`.
        """
        return self._act(tools, final, act_op(tools, final, max_calls, options), caller())

    async def use(self, turn: Turn[Any], *, max_parallel: int = 4) -> list[str]:
        """Run the tools that a turn calls, at most `max_parallel` at a time, and show the model the results.

        What a tool raises, or that it took too long, is a result as well: `error: ...`.
        """
        line = caller()
        results = await self._interpreter.use(turn.calls, max_parallel, self._path)
        self._conversation.add(results_prompt(turn.calls, results), line)
        return results

    def loop(self, max: int) -> Iterator[int]:
        """Count from 0, at most to `max` - 1; the limit tells a plan how often the body may run."""
        if max < 1:
            raise ValueError(f"loop(max={max}): at least one round is needed")
        return iter(range(max))

    def fork(self, n: int, *, name: str = "fork") -> list["State"]:
        """Return `n` independent branches that continue from here and share everything so far."""
        if n < 1:
            raise ValueError(f"fork({n}): at least one branch is needed")
        path = f"{self._path}/{self._count(name, is_call=False)}"
        return [self._branch(f"{path}.{i}", self._conversation.fork()) for i in range(n)]

    async def map(
        self, items: Iterable[Item], fn: Callable[["State", Item], Awaitable[T]], *, name: str = "fork"
    ) -> list[T]:
        """Fork once per item, run `fn(branch, item)` on all at once, and return the results in order.

        The first error cancels the other branches and is raised.
        """
        todo = list(items)
        branches = self.fork(len(todo), name=name) if todo else []
        results = await self._interpreter.gather(
            [fn(b, item) for b, item in zip(branches, todo, strict=True)]
        )
        self.join(branches)
        return results

    async def gather(self, pending: Iterable[Awaitable[T]]) -> list[T]:
        """Await calls on several branches at once, results in order; the first error cancels the others.

        Unlike `asyncio.gather`, a plan reads them in an order that is always the same.
        """
        return await self._interpreter.gather(list(pending))

    def join(self, branches: Sequence["State"]) -> None:
        """Go on from where all `branches` have ended; what only they had is not used again."""
        for branch in branches:
            branch.done()
        self._depth = max([self._depth, *(branch._depth for branch in branches)])
        after = [number for branch in branches for number in branch._after]
        self._after = tuple(dict.fromkeys(after)) or self._after

    def sub(self, *, name: str = "sub") -> "State":
        """Return a branch that begins with nothing, for another program or another chat in the same run."""
        empty = Conversation(self._conversation.chat, self._interpreter.encode)
        return self._branch(f"{self._path}/{self._count(name, is_call=False)}", empty)

    def done(self) -> None:
        """Say that this branch makes no more calls, so that its own tokens need no room any more."""
        if not self._is_done:
            self._is_done = True
            self._interpreter.branches_done(len(self._conversation.ids) - self._forked_len)

    def hint(self, *, priority: int | None = None, output_len: int | None = None) -> None:
        """Tell the scheduler of the calls to come from here: higher priority first; tokens each generates."""
        given = {"priority": priority, "output_len": output_len}
        self._hints = replace(self._hints, **{key: v for key, v in given.items() if v is not None})

    def pause(self, expected_s: float) -> None:
        """Say that the run makes no call for about `expected_s` seconds; `use` says so by itself."""
        self._interpreter.pause(expected_s)

    @contextmanager
    def returning(self, result_type: Any) -> Iterator[None]:
        """Let `result` mean another program's type, for as long as that runs on this state."""
        before, self._result_type = self._result_type, result_type
        try:
            yield
        finally:
            self._result_type = before

    def _branch(self, path: str, conversation: Conversation) -> "State":
        branch = State(self._interpreter, conversation, path, result_type=self._result_type)
        branch._depth, branch._after, branch._hints = self._depth, self._after, self._hints
        branch._forked_len = len(conversation.ids)
        return branch

    async def _value(self, op: Gen[Any], line: str) -> Any:
        return (await self._generate(op, line)).value

    async def _generate(self, op: Gen[Any], line: str) -> Generation[Any]:
        path = self._call_path(op.name)
        with self._answering(line):
            request = self._request(path, self._conversation.ids, op.params, top=op.num_top_logprobs)
            number, done, value = await self._interpreter.answer(
                request, self._site(line), op, self._conversation
            )
        self._advance((number,))
        self._conversation.close_answer(done.output_ids, done.text, line)
        return Generation(value, done.text, done.finish_reason, done.usage, done.output_logprobs)

    async def _act(self, tools: Sequence[Tool[..., Any]], final: Any, op: Gen[Any], line: str) -> Turn[Any]:
        return self._interpreter.turn(await self._value(op, line), tools, final)

    async def _select(self, op: Select, line: str) -> Selection:
        path = self._call_path(op.name)
        with self._answering(line):
            context = self._conversation.ids
            scored = await self._scores(path, context, op.choices, line)
            prior = self._conversation.prior() if op.rule == "vs_prior" else None
            priors = await self._scores(f"{path}/prior", prior, op.choices, line) if prior else None
        selection = self._interpreter.selection(op.choices, _weighed(op.rule, scored, priors))
        self._conversation.close_answer(self._interpreter.encode(selection.value), selection.value, line)
        return selection

    async def _scores(
        self, path: str, context: TokenIds, choices: Sequence[str], line: str
    ) -> list[tuple[float, ...]]:
        """Return the log-probabilities of each choice's tokens behind `context`."""
        encoded = [self._interpreter.encode(choice) for choice in choices]
        requests = [
            self._request(f"{path}:{i}", context + ids, SamplingParams(max_new_tokens=0), len(context))
            for i, ids in enumerate(encoded)
        ]
        site = self._site(line)
        answers = await self._interpreter.gather(
            [self._interpreter.answer(request, site, None, self._conversation) for request in requests]
        )
        self._advance(tuple(number for number, _, _ in answers))
        return [completion.logprobs for _, completion, _ in answers]

    def _request(
        self,
        path: str,
        prompt: TokenIds,
        sampling: SamplingParams,
        score_from: int | None = None,
        top: int | None = None,
    ) -> Request:
        said = self._conversation
        return Request(
            request_id=new_request_id(),
            program_id=self._interpreter.program_id,
            call_path=path,
            prompt=prompt,
            sampling=sampling,
            score_from=score_from,
            num_top_logprobs=top,
            messages=said.messages,
            images=said.images,
            text=said.text() if said.images else None,
            expected_output_len=self._hints.output_len,
            priority=self._hints.priority,
        )

    @contextmanager
    def _answering(self, line: str) -> Iterator[None]:
        """Begin an answer; if it does not come about, the conversation is as it was before."""
        if self._is_busy or self._is_done:
            raise InputError(
                f"{line}: this branch {'has ended' if self._is_done else 'is generating'}: fork first"
            )
        self._is_busy = True
        try:
            with self._conversation.answering(line):
                yield
        finally:
            self._is_busy = False

    def _site(self, line: str) -> CallSite:
        return CallSite(line=line, after=self._after, depth=self._depth)

    def _advance(self, numbers: tuple[int, ...]) -> None:
        self._after = numbers
        self._depth += 1

    def _call_path(self, name: str | None) -> str:
        return f"{self._path}/{self._count(name or 'call', is_call=name is None)}"

    def _count(self, name: str, *, is_call: bool) -> str:
        """Return a name that no call or fork of this branch has yet."""
        number = self._names.get(name, 0)
        self._names[name] = number + 1
        return f"{name}{number}" if number or is_call or name in ("fork", "sub") else name


def _as_gen(what: Any, options: GenOptions) -> Gen[Any]:
    return what if isinstance(what, Gen) else make_gen(what, **options)


def _weighed(
    rule: ScoreRule, scored: Sequence[tuple[float, ...]], priors: Sequence[tuple[float, ...]] | None
) -> tuple[float, ...]:
    """Return one score per choice, by the rule."""
    if rule == "sum_logprob":
        return tuple(sum(logprobs) for logprobs in scored)
    means = tuple(sum(logprobs) / len(logprobs) for logprobs in scored)
    if priors is None:
        return means
    return tuple(mean - sum(prior) / len(prior) for mean, prior in zip(means, priors, strict=True))
