"""Programs: decorated async functions that can be run, mapped over rows, and read before they run."""

import asyncio
import functools
import inspect
import typing
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, Unpack

from preble_sgl.core import PlanHint, ProgramId, Request, new_request_id
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.batch import Batch, MapOptions, Reorder, RowLoop, RowResult, RunOptions, check_rows
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.checkpoint import Checkpoint
from preble_sgl.dsl.concurrency import AdaptiveLimit, RowLimit
from preble_sgl.dsl.conversation import Conversation
from preble_sgl.dsl.events import Event, RunEnded
from preble_sgl.dsl.explore import Body, Explorer
from preble_sgl.dsl.interpreter import CallRecord, Runner, RunSettings
from preble_sgl.dsl.learning import learn
from preble_sgl.dsl.lint import unsteady_lines
from preble_sgl.dsl.output_cache import OutputCache
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.progress import ProgressBar
from preble_sgl.dsl.reorder import Ordering, order_fields, order_rows, ordered_fields
from preble_sgl.dsl.retry import NEVER
from preble_sgl.dsl.state import State
from preble_sgl.dsl.tables import is_table
from preble_sgl.errors import DeadlineError, InputError, RequestRejected

P = ParamSpec("P")
T = TypeVar("T")


class Program(Generic[P, T]):
    """A function of a state and arguments that calls a model; made by `@program`."""

    def __init__(self, body: Callable[Concatenate[State, P], Awaitable[T]]) -> None:
        if not inspect.iscoroutinefunction(body):
            raise TypeError(
                f"@program needs an async function: write `async def {getattr(body, '__name__', '…')}`"
            )
        functools.update_wrapper(self, body)
        self._body = body
        self._options: RunOptions = {}
        self.name = body.__name__
        parameters = list(inspect.signature(body).parameters.values())
        if not parameters:
            raise TypeError(f"@program: {self.name} needs the state as its first parameter")
        self.signature = inspect.Signature(parameters[1:])

    @functools.cached_property
    def declared_type(self) -> Any:
        """The type that the function is declared to return; `Signature.empty` if it does not say."""
        try:
            return typing.get_type_hints(self._body, include_extras=True).get(
                "return", inspect.Signature.empty
            )
        except NameError:  # a type of a function's own scope, written as a text
            return inspect.Signature.empty

    @property
    def result_type(self) -> Any:
        """The type that `s.result` generates: the declared one, `str` if there is none."""
        return str if self.declared_type is inspect.Signature.empty else self.declared_type

    def using(self, **options: Unpack[RunOptions]) -> Self:
        """Return the program with other options for every run of it.

        `seed` (0): what seeds of sampled calls derive from. `retry`: when a failed call is made again
        (never). `timeout_s`: seconds for a run, `call_timeout_s` for each of its calls; then DeadlineError
        is raised.
        """
        changed = object.__new__(type(self))
        changed.__dict__ |= self.__dict__
        changed._options = {**self._options, **options}
        return changed

    async def __call__(self, state: State, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run as part of another program, on its state."""
        with state.returning(self.result_type):
            return await self._body(state, *args, **kwargs)

    async def arun(self, backend: Backend, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run once and return the value. Raises what the body raises."""
        runner = self._runner(backend, self._options)
        return await self._run(runner, backend, self.name, self._options, *args, **kwargs)

    def run(self, backend: Backend, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run once and return the value, from code that is not async."""
        return backend.call(lambda: self.arun(backend, *args, **kwargs))

    async def astream(
        self, backend: Backend, /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncGenerator[Event, None]:
        """Run once and yield what happens (`ps.TextDelta`, `ps.CallEnded`, ...); `ps.RunEnded` comes last.

        Raises what the body raises. Leaving the loop early cancels the run and aborts its calls.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        runner = self._runner(backend, self._options, on_event=events.put_nowait)

        async def run() -> None:
            try:
                value = await self._run(runner, backend, self.name, self._options, *args, **kwargs)
                who = {"run": runner.program_id, "row": None, "branch": self.name}
                events.put_nowait(RunEnded(value=value, usage=runner.usage, **who))  # type: ignore[arg-type]
            finally:
                events.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (event := await events.get()) is not None:
                yield event
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def amap(self, rows: Iterable[Any], *, fleet: Backend, **options: Unpack[MapOptions]) -> Batch[T]:
        """Run once per row and return all outcomes in the order of the rows.

        A row is a mapping from argument names to values; a pandas, Polars or Arrow table will do as well. All
        rows are checked before the first one runs; InputError names the first that does not fit. A row that
        raises is reported in its `RowResult`; the others go on. Options, beside those of `using`:

        - `plan`: made by `aplan` from the same rows; the scheduler then knows what each run is going to need.
        - `concurrency`: most rows at a time; None (default) finds out how many are worth it.
        - `progress` (True): show a bar on standard error. `on_row`: is told of each row as it finishes.
        - `checkpoint`: a file to which rows are written as they finish. Run again with the same file, a batch
          goes on where it was killed; rows that failed run again.
        - `reorder`: `"rows"` runs rows that share beginnings one after the other; `"fields"` also changes the
          order of what the program writes with `ps.fields(...)`. Results keep the order of the rows.
        - `output_cache` (False): make equal greedy calls once for the whole batch.
        - `profile`: learns output lengths, branches and tool durations for later plans.
        """
        checked = self._checked(rows)
        run_options: RunOptions = {**self._options, **options}  # type: ignore[typeddict-unknown-key]
        plan, profile = options.get("plan"), options.get("profile")
        if plan is not None and len(plan.traces) != len(checked):
            raise InputError(f"the plan is of {len(plan.traces)} rows, but there are {len(checked)}")
        ordering = self._ordering(checked, fleet.chat, options.get("reorder"), plan)
        backend: Backend = OutputCache(fleet) if options.get("output_cache") else fleet
        limit = _limit(options.get("concurrency"))
        with ExitStack() as stack:
            bar = None
            if options.get("progress", True):
                bar = stack.enter_context(ProgressBar.shown(self.name, len(checked)))
            saved = None
            if (path := options.get("checkpoint")) is not None:
                opened = Checkpoint.opened(
                    path, program=self.name, rows=checked, result_type=self.declared_type
                )
                saved = stack.enter_context(opened)

            async def run_row(index: int) -> RowResult[T]:
                runner = self._runner(
                    backend, run_options, row=index, on_call=bar.on_call if bar else None, profile=profile
                )
                hint = plan.hint(index, runner.program_id) if plan else None
                with ordered_fields(ordering.fields[index] if ordering.fields else None):
                    result = await self._row(runner, backend, index, checked[index], run_options, hint)
                if isinstance(result.error, RequestRejected):
                    limit.on_overload()
                return result

            loop = RowLoop(run_row, limit, saved, bar, options.get("on_row"))
            batch = Batch(await loop.run(ordering.rows), rows if is_table(rows) else None)
        if profile is not None:
            learn(profile, self.name, batch, plan)
        return batch

    def map(self, rows: Iterable[Any], *, fleet: Backend, **options: Unpack[MapOptions]) -> Batch[T]:
        """Do what `amap` does, from code that is not async."""
        return fleet.call(lambda: self.amap(rows, fleet=fleet, **options))

    async def aplan(
        self,
        rows: Iterable[Any],
        *,
        fleet: Backend | ChatFormat,
        profile: ProgramProfile | None = None,
        reorder: Reorder | None = None,
    ) -> Plan:
        """Read what `amap` would call, without calling: the body runs with symbolic answers.

        Only the tokenizer and chat template are needed: a `ChatFormat` alone will do for `fleet`. `profile`:
        what earlier runs have shown. `reorder`: as `amap` takes it.

        A row whose body raises is read up to there. Raises InputError for a row that does not fit.
        """
        checked = self._checked(rows)
        chat = fleet if isinstance(fleet, ChatFormat) else fleet.chat
        body = Body(self._body, self.name, self.result_type)
        explorer = Explorer(body, chat, profile)
        ordering = self._ordering(checked, chat, reorder, None)
        traces = []
        for index, row in enumerate(checked):
            with ordered_fields(ordering.fields[index] if ordering.fields else None):
                traces.append(await explorer.trace(index, row))
        warnings = (*explorer.warnings, *unsteady_lines(self._body))
        return Plan(self.name, tuple(traces), warnings, ordering)

    def plan(
        self,
        rows: Iterable[Any],
        *,
        fleet: Backend,
        profile: ProgramProfile | None = None,
        reorder: Reorder | None = None,
    ) -> Plan:
        """Do what `aplan` does, from code that is not async."""
        return fleet.call(lambda: self.aplan(rows, fleet=fleet, profile=profile, reorder=reorder))

    def _checked(self, rows: Iterable[Any]) -> list[dict[str, Any]]:
        return check_rows(self.name, self.signature, rows)

    def _ordering(
        self, rows: list[dict[str, Any]], chat: ChatFormat, reorder: Reorder | None, plan: Plan | None
    ) -> Ordering:
        """Return the order in which to run rows, and of their fields (empty: as they are)."""
        if plan is not None and (reorder is None or plan.ordering.fields):
            return plan.ordering
        texts = [{name: str(value) for name, value in row.items()} for row in rows]
        if reorder == "fields":
            return order_fields(texts, length=lambda text: len(chat.encode(text)))
        if reorder == "rows":
            return Ordering(order_rows(texts).rows, ())
        if reorder is not None:
            raise InputError(f'reorder={reorder!r}: give "rows" or "fields"')
        return Ordering(tuple(range(len(rows))), ())

    async def _run(
        self, runner: Runner, backend: Backend, path: str, options: RunOptions, /, *args: Any, **kwargs: Any
    ) -> T:
        with _begun(backend, PlanHint(program_id=runner.program_id), options.get("timeout_s")):
            return await self._within(runner, backend, path, options, args, kwargs)

    async def _within(
        self, runner: Runner, backend: Backend, path: str, options: RunOptions, args: Any, kwargs: Any
    ) -> T:
        """Run the body; raises DeadlineError when it takes too long."""
        limit = options.get("timeout_s")
        state = State(
            runner, Conversation(backend.chat, backend.chat.encode), path, result_type=self.result_type
        )
        try:
            async with asyncio.timeout(limit) as scope:
                return await self._body(state, *args, **kwargs)
        except TimeoutError as error:
            if not scope.expired():
                raise
            message = f"{path}: not finished within {limit:g} s, after {len(runner.calls)} calls"
            raise DeadlineError(message, program_id=runner.program_id) from error

    async def _row(
        self,
        runner: Runner,
        backend: Backend,
        index: int,
        row: dict[str, Any],
        options: RunOptions,
        hint: PlanHint | None,
    ) -> RowResult[T]:
        value, error = None, None
        try:
            with _begun(backend, hint or PlanHint(program_id=runner.program_id), options.get("timeout_s")):
                value = await self._within(runner, backend, f"{self.name}[{index}]", options, (), row)
        except Exception as raised:
            error = raised
        return RowResult(
            index,
            value,
            error,
            len(runner.calls),
            runner.usage,
            tuple(runner.calls),
            tuple(runner.tools),
            runner.failed_call if error else None,
            runner.failed_attempts if error else 0,
        )

    def _predict(
        self, options: RunOptions, profile: ProgramProfile | None
    ) -> Callable[[Request, str], float | None]:
        """Return what says how long an answer may get: the given predictor, else the call site's profile."""
        predictor = options.get("predictor")

        def predict(request: Request, line: str) -> float | None:
            known = predictor(request) if predictor else None
            return profile.output_len(self.name, line) if known is None and profile else known

        return predict

    def _runner(
        self,
        backend: Backend,
        options: RunOptions,
        *,
        row: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        on_call: Callable[[CallRecord], None] | None = None,
        profile: ProgramProfile | None = None,
    ) -> Runner:
        settings = RunSettings(
            seed=options.get("seed", 0),
            retry=options.get("retry", NEVER),
            timeout_s=options.get("call_timeout_s"),
            on_event=on_event,
            on_call=on_call,
            tool_s=profile.tool_s if profile else lambda name: None,
            predict=self._predict(options, profile),
        )
        return Runner(backend, ProgramId(new_request_id()), settings, row)


def _limit(concurrency: int | None) -> RowLimit:
    if concurrency is None:
        return AdaptiveLimit(asyncio.get_running_loop().time())
    if concurrency < 1:
        raise InputError(f"concurrency={concurrency}: at least one row must run")
    return RowLimit(concurrency)


@contextmanager
def _begun(backend: Backend, hint: PlanHint, timeout_s: float | None) -> Iterator[None]:
    """Let the backend know how long a program run lasts, and when it should end."""
    if timeout_s is not None:
        hint = replace(hint, deadline_at=asyncio.get_running_loop().time() + timeout_s)
    backend.begin_program(hint)
    try:
        yield
    finally:
        backend.end_program(hint.program_id)


def program(body: Callable[Concatenate[State, P], Awaitable[T]]) -> Program[P, T]:
    """Turn `async def f(s, ...)` into a program.

    The function may use any Python; `s` is where text is added and the model is called. Raises TypeError
    when it is not async or takes no state.
    """
    return Program(body)
