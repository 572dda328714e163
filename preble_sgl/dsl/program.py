"""Programs: decorated async functions that can be run, mapped over rows, and read before they run."""

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from preble_sgl.core import PlanHint, ProgramId, new_request_id
from preble_sgl.dsl.backend import Backend
from preble_sgl.dsl.batch import Batch, OnCall, ProgressBar, Row, RowResult, check_rows, run_rows
from preble_sgl.dsl.chat import ChatFormat, Conversation
from preble_sgl.dsl.interpreter import Runner
from preble_sgl.dsl.plan import Plan
from preble_sgl.dsl.state import State
from preble_sgl.dsl.tracer import trace
from preble_sgl.errors import InputError

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
        self.name = body.__name__
        parameters = list(inspect.signature(body).parameters.values())
        if not parameters:
            raise TypeError(f"@program: {self.name} needs the state as its first parameter")
        self.signature = inspect.Signature(parameters[1:])

    async def __call__(self, state: State, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run as part of another program, on its state."""
        return await self._body(state, *args, **kwargs)

    async def arun(self, backend: Backend, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run once and return the value. Raises what the body raises."""
        runner = self._runner(backend, None)
        with _program(backend, PlanHint(program_id=runner.program_id)):
            return await self._body(self._state(runner, backend, self.name), *args, **kwargs)

    def run(self, backend: Backend, /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run once and return the value, from code that is not async."""
        return backend.call(lambda: self.arun(backend, *args, **kwargs))

    async def amap(
        self,
        rows: Iterable[Row],
        *,
        fleet: Backend,
        plan: Plan | None = None,
        concurrency: int = 64,
        progress: bool = True,
        on_row: Callable[[RowResult[T]], None] | None = None,
    ) -> Batch[T]:
        """Run once per row and return all outcomes in the order of the rows.

        A row is a mapping from argument names to values. All rows are checked before the first one
        runs; InputError names the first that does not fit. A row that raises is reported in its
        `RowResult`; the others go on. `plan`, made by `aplan` from the same rows, lets the scheduler see
        what each run is going to need. At most `concurrency` rows run at a time. `on_row` is told of each
        row as it finishes. `progress` shows a bar on standard error.
        """
        if concurrency < 1:
            raise InputError(f"concurrency={concurrency}: at least one row must run")
        checked = check_rows(self.name, self.signature, rows)
        if plan is not None and len(plan.traces) != len(checked):
            raise InputError(f"the plan is of {len(plan.traces)} rows, but there are {len(checked)}")
        shown = ProgressBar.shown(self.name, len(checked)) if progress else nullcontext()
        with shown as bar:
            return await run_rows(
                lambda index, on_call: self._run_row(fleet, index, checked[index], plan, on_call),
                len(checked),
                concurrency=concurrency,
                progress=bar,
                on_row=on_row,
            )

    def map(
        self,
        rows: Iterable[Row],
        *,
        fleet: Backend,
        plan: Plan | None = None,
        concurrency: int = 64,
        progress: bool = True,
        on_row: Callable[[RowResult[T]], None] | None = None,
    ) -> Batch[T]:
        """Do what `amap` does, from code that is not async."""
        return fleet.call(
            lambda: self.amap(
                rows, fleet=fleet, plan=plan, concurrency=concurrency, progress=progress, on_row=on_row
            )
        )

    async def aplan(self, rows: Iterable[Row], *, fleet: Backend | ChatFormat) -> Plan:
        """Read what `amap` would call, without calling. Runs the body once per row, with symbolic answers.

        Only the tokenizer and chat template are needed: a `ChatFormat` alone will do for `fleet`.

        A row whose body raises is read up to there. Raises InputError for a row that does not fit.
        """
        checked = check_rows(self.name, self.signature, rows)
        chat = fleet if isinstance(fleet, ChatFormat) else fleet.chat
        traces = [await trace(self._body, chat, i, self.name, row) for i, row in enumerate(checked)]
        return Plan(self.name, tuple(traces))

    def plan(self, rows: Iterable[Row], *, fleet: Backend) -> Plan:
        """Do what `aplan` does, from code that is not async."""
        return fleet.call(lambda: self.aplan(rows, fleet=fleet))

    async def _run_row(
        self, backend: Backend, index: int, row: dict[str, Any], plan: Plan | None, on_call: OnCall
    ) -> RowResult[T]:
        runner = self._runner(backend, on_call)
        state = self._state(runner, backend, f"{self.name}[{index}]")
        hint = plan.hint(index, runner.program_id) if plan else PlanHint(program_id=runner.program_id)
        try:
            with _program(backend, hint):
                value = await self._body(state, **row)  # type: ignore[call-arg]
        except Exception as error:
            return RowResult(index, None, error, runner.num_calls, runner.usage)
        return RowResult(index, value, None, runner.num_calls, runner.usage)

    def _runner(self, backend: Backend, on_call: OnCall | None) -> Runner:
        return Runner(backend, ProgramId(new_request_id()), on_call)

    def _state(self, runner: Runner, backend: Backend, path: str) -> State:
        return State(runner, Conversation(backend.chat, backend.chat.encode), path)


@contextmanager
def _program(backend: Backend, hint: PlanHint) -> Iterator[None]:
    """Let the backend know how long a program run lasts."""
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
