"""The command line: demo, run, explain, doctor, make-model.

Bad input and failures of the world are one line on standard error and exit status 2; rows that failed
are reported in the output and make the exit status 1.
"""

import asyncio
import gc
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preble_sgl.errors import InputError, PrebleError

if TYPE_CHECKING:
    from preble_sgl.fleet import FleetContext

GC_THRESHOLDS = (50_000, 20, 20)
"""The scheduler makes no cyclic garbage but many small objects: Python's defaults look for it too often."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ProgramFile = Annotated[
    str, typer.Argument(metavar="FILE[:NAME]", help="Python file with the program; NAME if it has several.")
]
Rows = Annotated[Path, typer.Option("--rows", help="JSON lines: one object of arguments per row.")]
ModelPath = Annotated[
    Path | None,
    typer.Option("--model-path", help="Hugging Face model directory; default: a small random-weight Llama."),
]
Runtimes = Annotated[
    int | None, typer.Option("--runtimes", help="How many; default: one per GPU, or 2 on a CPU.")
]
Attach = Annotated[
    list[str] | None, typer.Option("--attach", help="URL of a running SGLang server; repeatable.")
]
KvTokens = Annotated[
    int | None, typer.Option("--kv-tokens", help="Size of each runtime's KV cache in tokens.")
]
Port = Annotated[
    int | None,
    typer.Option("--port", help="Port of the first runtime, then counting up; default: free ports."),
]
Policy = Annotated[
    str, typer.Option("--policy", help="Placement: preble_e2, preble_plan, sticky, sticky@32, …")
]


@app.command()
def demo(model_path: ModelPath = None, runtimes: Runtimes = None) -> None:
    """Run two programs over real text with E2 placement, then with round robin, and compare."""
    from preble_sgl.commands.demo import run_demo

    _run(run_demo(model_path, runtimes))


@app.command()
def run(
    program: ProgramFile,
    rows: Rows,
    out: Annotated[Path, typer.Option("--out", help="Where the results go, as JSON lines.")],
    model_path: ModelPath = None,
    runtimes: Runtimes = None,
    kv_tokens: KvTokens = None,
    port: Port = None,
    attach: Attach = None,
    policy: Policy = "preble_e2",
    concurrency: Annotated[int, typer.Option("--concurrency", help="Most rows under way at a time.")] = 64,
) -> None:
    """Run a program once per row."""
    from preble_sgl.commands.batch_job import BatchJob

    job = BatchJob.prepare(program, rows, out, concurrency)
    fleet = _fleet(model_path, attach, policy, runtimes=runtimes, kv_tokens=kv_tokens, port=port)
    num_failed = _run(job.run(fleet))
    if num_failed:
        _fail(f"{num_failed} of {len(job.rows)} rows failed: see the errors in {out}", status=1)


@app.command()
def explain(
    program: ProgramFile,
    rows: Rows,
    model_path: ModelPath = None,
    runtimes: Runtimes = None,
    kv_tokens: KvTokens = None,
    policy: Policy = "preble_e2",
) -> None:
    """Print what a run would share, without running: the prefix tree and the reuse that placement keeps."""
    from preble_sgl.commands.batch_job import explain_job

    work = explain_job(
        program, rows, model_path=model_path, runtimes=runtimes, kv_tokens=kv_tokens, policy=policy
    )
    typer.echo(_run(work))


@app.command()
def doctor() -> None:
    """Say what this machine can run, what is missing, and the command that mends it."""
    from preble_sgl.commands.doctor import examine

    report = examine()
    typer.echo(report.text)
    raise typer.Exit(0 if report.healthy else 1)


@app.command("make-model")
def make_model(directory: Path, seed: int = 0) -> None:
    """Write a small Llama with random weights, its tokenizer and chat template."""
    from preble_sgl.machine import write_model

    typer.echo(write_model(directory, seed))


def _fleet(model_path: Path | None, attach: list[str] | None, policy: str, **launch: Any) -> "FleetContext":
    from preble_sgl.fleet import Fleet

    if not attach:
        return Fleet.launch(model_path, policy=policy, **launch)
    if any(value is not None for value in launch.values()):
        raise InputError("--attach uses servers as they run: leave out --runtimes, --kv-tokens and --port")
    return Fleet.attach(attach, model_path=model_path, policy=policy)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def _fail(message: str, status: int) -> None:
    typer.echo(f"preble-sgl: {message}", err=True)
    raise typer.Exit(status)


def main() -> None:
    """Run the command line."""
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        app()
    except (InputError, PrebleError) as error:
        typer.echo(f"preble-sgl: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
