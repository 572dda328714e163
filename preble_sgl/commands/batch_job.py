"""`preble-sgl run` and `preble-sgl explain`: a program file, a rows file, an output file."""

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from pydantic_core import to_jsonable_python

from preble_sgl.commands.program_file import load_program, load_rows
from preble_sgl.control import controlled
from preble_sgl.dsl.batch import MapOptions, Row, RowResult, check_rows
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.program import Program
from preble_sgl.dsl.program_profile import ProgramProfile
from preble_sgl.dsl.retry import Retry
from preble_sgl.errors import InputError
from preble_sgl.fleet import Fleet
from preble_sgl.machine import default_model, planned_workers
from preble_sgl.opening import Opening
from preble_sgl.predict import predict


@dataclass(frozen=True, slots=True)
class BatchJob:
    """A batch whose program, rows and output were checked before anything is started."""

    program: Program[Any, Any]
    rows: list[Row]
    out: Path
    options: MapOptions
    profile_file: Path | None = None

    @classmethod
    def prepare(
        cls, program: str, rows: Path, out: Path, options: MapOptions, profile_file: Path | None = None
    ) -> "BatchJob":
        """Load everything. Raises InputError for what cannot work; nothing is written then."""
        concurrency = options.get("concurrency")
        if concurrency is not None and concurrency < 1:
            raise InputError(f"--concurrency {concurrency}: at least 1 is needed")
        if not out.parent.is_dir():
            raise InputError(f"--out: the directory {out.parent} does not exist")
        if profile_file is not None:
            options = {**options, "profile": ProgramProfile.load(profile_file)}
        return cls(*load_job(program, rows), out, options, profile_file)

    async def run(self, opening: Opening[Fleet]) -> int | None:
        """Run all rows and return how many failed. The output appears complete or not at all.

        While the batch runs its finished rows are in `OUT.part`, in the order in which they finished. After
        SIGTERM the rows that have begun end, no other begins, and None is returned; a second one ends all.
        """
        part = self.out.with_name(self.out.name + ".part")
        profile = self.options.get("profile")
        async with opening as fleet, controlled(fleet):
            _heed_sigterm(fleet)
            plan = await self.program.aplan(
                self.rows, fleet=fleet, profile=profile, reorder=self.options.get("reorder")
            )
            with part.open("wb") as file:
                options: MapOptions = {
                    **self.options,
                    "plan": plan,
                    "on_row": lambda result: _write(file, result),
                }
                batch = await self.program.amap(self.rows, fleet=fleet, **options)
        if not fleet.takes_programs:
            return None
        part.write_bytes(b"".join(_line(result) for result in batch))
        os.replace(part, self.out)
        if profile is not None and self.profile_file is not None:
            profile.save(self.profile_file)
        return len(batch.errors)


def map_options(given: Mapping[str, Any]) -> MapOptions:
    """Return the options of `map` from those of the command line. Raises InputError."""
    options: MapOptions = {
        "concurrency": given["concurrency"],
        "checkpoint": given["checkpoint"],
        "reorder": given["reorder"],
        "output_cache": given["output_cache"],
        "seed": given["seed"],
    }
    if given["reorder"] not in (None, "rows", "fields"):
        raise InputError(f"--reorder {given['reorder']}: rows or fields")
    if given["attempts"] < 1:
        raise InputError(f"--attempts {given['attempts']}: at least 1 is needed")
    options["retry"] = Retry(attempts=given["attempts"])
    if given["timeout"] is not None:
        options["timeout_s"] = given["timeout"]
    return options


def load_job(program: str, rows: Path) -> tuple[Program[Any, Any], list[Row]]:
    """Load a program and rows that fit it. Raises InputError for what does not."""
    loaded = load_program(program)
    found = load_rows(rows)
    check_rows(loaded.name, loaded.signature, found)
    return loaded, found


async def explain_job(
    program: str,
    rows: Path,
    *,
    model_path: Path | None,
    runtimes: int | None,
    kv_tokens: int | None,
    policy: str,
    html: Path | None = None,
    mermaid: Path | None = None,
) -> str:
    """Return the plan of a batch as text, and what the policy would keep of its reuse.

    `html` and `mermaid`: files that the plan is written to, as a page and as a call graph.
    """
    loaded, found = load_job(program, rows)
    workers = planned_workers(runtimes, kv_tokens)
    plan = await loaded.aplan(found, fleet=ChatFormat.load(model_path or default_model()))
    if html is not None:
        plan.html(html)
    if mermaid is not None:
        mermaid.write_text(plan.mermaid())
    prediction = predict(plan, workers, policy)
    where = f"{len(workers)} runtimes of {workers[0].kv_tokens:,} KV tokens"
    return f"{plan.explain()}\non {where}: {prediction.describe()}"


def _heed_sigterm(fleet: Fleet) -> None:
    loop = asyncio.get_running_loop()

    def finish() -> None:
        fleet.close_to_programs()
        loop.remove_signal_handler(signal.SIGTERM)

    loop.add_signal_handler(signal.SIGTERM, finish)


def _write(file: BinaryIO, result: RowResult[Any]) -> None:
    file.write(_line(result))
    file.flush()


def _line(result: RowResult[Any]) -> bytes:
    line: dict[str, Any] = {"row": result.index}
    if result.error is None:
        line["value"] = to_jsonable_python(result.value, fallback=str)
    else:
        line["error"] = {"type": type(result.error).__name__, "message": str(result.error)}
    usage = result.usage
    line["usage"] = {
        "calls": result.num_calls,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
    }
    return orjson.dumps(line) + b"\n"
