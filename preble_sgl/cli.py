"""The command line: demo, run, explain, serve, simulate, emulate, calibrate, doctor, workers, drain,
add, make-model.

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

from preble_sgl.commands import GC_THRESHOLDS
from preble_sgl.errors import InputError, PrebleError

if TYPE_CHECKING:
    from preble_sgl.fleet import Fleet
    from preble_sgl.opening import Opening

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
FleetFile = Annotated[
    Path | None, typer.Option("--fleet", help="A fleet.toml: which runtimes to start or to attach to.")
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
    fleet_file: FleetFile = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Placement; default: the fleet file's, or preble_e2.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Most rows at a time; default: as many as pay.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Kept while running; a killed run goes on from it.")
    ] = None,
    attempts: Annotated[int, typer.Option("--attempts", help="How often a failing call is made.")] = 1,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds that a row may take.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampled calls.")] = 0,
    reorder: Annotated[
        str | None, typer.Option("--reorder", help="rows or fields: run in an order that shares more.")
    ] = None,
    output_cache: Annotated[
        bool, typer.Option("--output-cache", help="Make equal greedy calls once.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="SQLite file that learns for later plans.")
    ] = None,
) -> None:
    """Run a program once per row."""
    options = locals().copy()
    from preble_sgl.commands.batch_job import BatchJob, map_options

    job = BatchJob.prepare(program, rows, out, map_options(options), profile)
    launch = {"runtimes": runtimes, "kv_tokens": kv_tokens, "port": port}
    fleet = _fleet(model_path, attach, fleet_file, policy, **launch)
    num_failed = _run(job.run(fleet))
    if num_failed is None:
        _fail("ended early, as told: the rows that finished are in the checkpoint", status=143)
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
    html: Annotated[Path | None, typer.Option("--html", help="Also write the plan as a page.")] = None,
    mermaid: Annotated[
        Path | None, typer.Option("--mermaid", help="Also write the call graph, in Mermaid's language.")
    ] = None,
) -> None:
    """Print what a run would share, without running: the prefix tree and the reuse that placement keeps."""
    options = locals().copy()
    from preble_sgl.commands.batch_job import explain_job

    work = explain_job(**options)
    typer.echo(_run(work))


@app.command()
def doctor(
    fleet: FleetFile = None,
    model_path: ModelPath = None,
    quick: Annotated[bool, typer.Option("--quick", help="Start no runtime.")] = False,
) -> None:
    """Say what this machine can run, what is missing, and what mends it; then generate one token."""
    from preble_sgl.commands.doctor import examine, try_one_token

    report = examine(fleet)
    typer.echo(report.text)
    if report.healthy and not quick:
        report = _run(try_one_token(model_path))
        typer.echo(report.text)
    typer.echo("ready: try `preble-sgl demo`" if report.healthy else "not ready: see the lines with ✗")
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def workers() -> None:
    """List the workers of the fleets that you have running on this machine."""
    from preble_sgl.commands.workers import worker_table

    typer.echo(_run(worker_table()), nl=False)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="As `preble-sgl workers` names it.")],
    notice: Annotated[
        float | None,
        typer.Option("--notice", help="Seconds until it is taken away; default: as long as its calls take."),
    ] = None,
) -> None:
    """Place nothing more on a worker, let its calls finish or move, and end its runtime."""
    from preble_sgl.control import drain_worker

    _run(drain_worker(worker, notice))
    typer.echo(f"{worker} is drained")


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="Of an SGLang server with the fleet's model.")],
    process: Annotated[
        int | None, typer.Option("--process", help="Of the fleet, if several run here.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="PREBLE_RUNTIME_KEY", help="That the server asks for.")
    ] = None,
) -> None:
    """Let a running fleet use one more server. There is no HTTP route for it: no request names a URL."""
    from preble_sgl.control import add_worker

    typer.echo(f"{_run(add_worker(url, api_key, process))} is in use")


@app.command()
def serve(
    model_path: ModelPath = None,
    attach: Attach = None,
    fleet_file: FleetFile = None,
    runtimes: Runtimes = None,
    kv_tokens: KvTokens = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: a free one.")] = 30000,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Placement; default: the fleet file's, or preble_e2.")
    ] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="API keys and tenants, a .toml file.")] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="TLS: a PEM file.")] = None,
    private_key: Annotated[Path | None, typer.Option("--private-key", help="TLS: a PEM file.")] = None,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, help="Requests at a time; more wait.")
    ] = 2048,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=0, help="Requests that may wait; more get a 429.")
    ] = 2048,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.001, help="Seconds that a request may take.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line of JSON per request, on standard error.")
    ] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="That take connections, around one scheduler.")
    ] = 1,
) -> None:
    """Serve OpenAI's API over SGLang runtimes that are started here, or that run already (--attach)."""
    from preble_sgl.commands.serve import ServeFleet

    server = ServeFleet(
        host=host,
        port=port,
        keys=keys,
        certificate=certificate,
        private_key=private_key,
        max_running=max_running,
        max_waiting=max_waiting,
        timeout=timeout,
        access_log=access_log,
        processes=processes,
    )
    server.run(_fleet(model_path, attach, fleet_file, policy, runtimes=runtimes, kv_tokens=kv_tokens))


@app.command()
def emulate(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="h100-llama3-8b, …, or a .toml file.")],
    runtimes: Annotated[int, typer.Option("--runtimes", help="How many.")] = 1,
    port: Annotated[int, typer.Option("--port", help="Port of the first, then counting up.")] = 31001,
    model_path: Annotated[
        Path | None,
        typer.Option("--model-path", help="Model directory with a tokenizer; default: made-up tokens."),
    ] = None,
    order: Annotated[str, typer.Option("--order", help="Wait queue: lpm, fcfs or preble_groups.")] = "lpm",
    page_size: Annotated[int, typer.Option("--page-size", help="KV-cache page in tokens.")] = 1,
    kv_events: Annotated[bool, typer.Option("--kv-events", help="Publish cache events over ZeroMQ.")] = False,
) -> None:
    """Serve emulated runtimes: SGLang's API with a GPU's timing and no model, to race routers."""
    from preble_sgl.commands.emulate import Emulated, serve_emulated

    emulated = Emulated.checked(
        profile,
        runtimes=runtimes,
        port=port,
        model_path=model_path,
        order=order,
        page_size=page_size,
        kv_events=kv_events,
    )
    _run(serve_emulated(emulated))


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="The profile, a .toml file; measurements: .json.")],
    attach: Annotated[
        str | None, typer.Option("--attach", help="URL of an idle SGLang server; default: start one.")
    ] = None,
    model_path: ModelPath = None,
    kv_tokens: KvTokens = None,
    model: Annotated[str | None, typer.Option("--model", help="The model's name in the profile.")] = None,
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="The hardware's name in the profile.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer points and rounds: seconds, but rough.")
    ] = False,
) -> None:
    """Measure what work costs on an SGLang server, and write it as a cost profile with its error."""
    from preble_sgl.commands.calibrate import Calibration

    calibration = Calibration.checked(out, model=model, hardware=hardware, quick=quick)
    _run(calibration.run(attach, model_path, kv_tokens))


@app.command()
def simulate(
    policy: Annotated[str, typer.Option("--policy", help="One or several, with commas.")] = (
        "preble_plan,preble_e2,cache_aware,round_robin"
    ),
    workload: Annotated[
        str, typer.Option("--workload", help="toolbench, alfworld, apps, videoqa, loogle, azure_conv, …")
    ] = "toolbench",
    rps: Annotated[
        str | None, typer.Option("--rps", help="Requests per second: 10, or 1,2,4, or first:last:step.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="A trace: Mooncake's JSON lines or Azure's CSV.")
    ] = None,
    program: Annotated[
        str | None, typer.Option("--program", metavar="FILE[:NAME]", help="A program, with --rows.")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="JSON lines for --program.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Workers.")] = 4,
    profile: Annotated[
        str, typer.Option("--profile", help="A cost profile by name, or a .toml file.")
    ] = "a6000-mistral-7b",
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds, from 0.")] = 1,
    duration: Annotated[float, typer.Option("--duration", help="Seconds for which requests arrive.")] = 120.0,
    arrivals: Annotated[
        str, typer.Option("--arrivals", help="poisson, gamma:CV, azure_code or azure_conv.")
    ] = "poisson",
    order: Annotated[str, typer.Option("--order", help="Wait queue: lpm, fcfs or preble_groups.")] = "lpm",
    mixed_chunk: Annotated[bool, typer.Option("--mixed-chunk", help="Decode beside prefill chunks.")] = False,
    page_size: Annotated[int, typer.Option("--page-size", help="KV-cache page in tokens.")] = 1,
    kv_tokens: KvTokens = None,
    cache_events: Annotated[
        bool, typer.Option("--cache-events", help="Runtimes tell the scheduler of their caches.")
    ] = False,
    objective: Annotated[
        str, typer.Option("--objective", help="throughput or latency, for preble_plan.")
    ] = "throughput",
    what_if: Annotated[
        bool, typer.Option("--what-if", help="How many workers keep the SLO below, instead of --gpus?")
    ] = False,
    slo_p99: Annotated[float | None, typer.Option("--slo-p99", help="p99 latency, seconds.")] = None,
    slo_ttft: Annotated[float | None, typer.Option("--slo-ttft", help="p99 time to first token, s.")] = None,
    plot: Annotated[Path, typer.Option("--plot", help="Where the plot goes (.svg, .png, .pdf).")] = Path(
        "simulate.svg"
    ),
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw none.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", help="Processes; default: one per core.")] = None,
) -> None:
    """Run policies on workers in virtual time: a table, a plot, and JSON as the last line."""
    options = locals().copy()
    from preble_sgl.commands.simulate_options import SimulateOptions

    SimulateOptions(**options).run()


@app.command("make-model")
def make_model(directory: Path, seed: int = 0) -> None:
    """Write a small Llama with random weights, its tokenizer and chat template."""
    from preble_sgl.machine import write_model

    typer.echo(write_model(directory, seed))


def _fleet(
    model_path: Path | None, attach: list[str] | None, file: Path | None, policy: str | None, **launch: Any
) -> "Opening[Fleet]":
    from preble_sgl.fleet import Fleet
    from preble_sgl.fleet_file import DEFAULT_POLICY

    if file is not None:
        if model_path or attach or any(value is not None for value in launch.values()):
            raise InputError(f"{file} says what to run: leave out the options that do, too")
        return Fleet.load(file, policy=policy)
    policy = policy or DEFAULT_POLICY
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
