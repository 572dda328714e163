"""`preble-sgl simulate --program`: a program's rows as one batch on simulated workers, policy by policy."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson
from rich.table import Table

from preble_sgl.commands.batch_job import load_job
from preble_sgl.commands.simulate import origin, wide_console
from preble_sgl.dsl.batch import Row
from preble_sgl.dsl.chat import ChatFormat
from preble_sgl.dsl.program import Program
from preble_sgl.machine import default_model
from preble_sgl.sim.points import Setting
from preble_sgl.sim.programs import ScriptedAnswers, SimulatedBackend
from preble_sgl.sim.report import Summary


def simulate_program(program: str, rows: Path, settings: Sequence[Setting]) -> None:
    """Run the rows under every setting; print a table, and JSON as the last line.

    Prompts are tokenised as for the small default model. Generated text is as long as each call allows.
    Raises InputError for what does not fit, or the first row's error.
    """
    loaded, found = load_job(program, rows)
    chat = ChatFormat.load(default_model())
    shown = Table(title=f"{loaded.name}, {len(found)} rows, simulated")
    for column in ("policy", "calls", "computed tokens", "hit rate", "program, s", "p99, s", "all, s"):
        shown.add_column(column, justify="left" if column == "policy" else "right")
    results = []
    for setting in settings:
        summary, computed = run_batch(loaded, found, setting, chat)
        seconds = (summary.mean_program_s, summary.p99_program_s, summary.makespan_s)
        cells = (f"{summary.finished:,}", f"{computed:,}", f"{summary.hit_rate:.1%}")
        shown.add_row(setting.policy, *cells, *(f"{value:.2f}" for value in seconds))
        result = {"policy": setting.policy, "seed": setting.seed, "computed_tokens": computed}
        results.append(result | asdict(summary))
    console = wide_console()
    console.print(shown)
    console.print(origin(settings[0].profile), highlight=False)
    print(orjson.dumps({"programs": results}).decode())


def run_batch(
    program: Program[..., object], rows: Sequence[Row], setting: Setting, chat: ChatFormat
) -> tuple[Summary, int]:
    """Return what came of a planned batch, and the prompt tokens that were computed."""
    backend = SimulatedBackend(setting, ScriptedAnswers(chat, setting.seed), chat=chat)
    try:
        plan = program.plan(rows, fleet=backend)
        batch = program.map(rows, fleet=backend, plan=plan, progress=False)
        assert len(batch.values) == len(rows)
        return backend.summary(), sum(record.usage.computed_tokens for record in backend.records)
    finally:
        backend.close()
