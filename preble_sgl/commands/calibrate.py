"""`preble-sgl calibrate`: measure a server, fit the costs of its iterations, write them as a profile."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from preble_sgl.commands.profile_file import write_profile
from preble_sgl.errors import InputError
from preble_sgl.machine import launch_specs
from preble_sgl.profiles import Profile
from preble_sgl.runtime_ext.launcher import launch_runtime
from preble_sgl.runtime_ext.probe import Measurement, Probe, open_probe
from preble_sgl.runtime_ext.probe_points import Point, choose_points
from preble_sgl.sim.fit import Fit, Iteration, Sample, fit_costs, prompt_iterations

ROUNDS, QUICK_ROUNDS = 5, 2
SOURCE = (
    "`preble-sgl calibrate` on SGLang {version}: {points} points, each the median of {rounds} interleaved "
    "rounds; least squares of the relative error, no coefficient below 0. Prefills: engine time as the "
    "server counts it. Decode steps: gaps between tokens while the whole batch runs."
)
KINDS = {
    "cold": "cold prompt TTFT",
    "hit": "prefix hit TTFT",
    "together": "prompts together",
    "decode": "decode step",
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Where the profile goes and how the server is named in it; its measurements go beside it, as .json."""

    out: Path
    model: str | None
    hardware: str | None
    quick: bool

    @classmethod
    def checked(cls, out: Path, *, model: str | None, hardware: str | None, quick: bool) -> "Calibration":
        """Raise InputError before anything is started if the profile could not be written or read."""
        if out.suffix != ".toml":
            raise InputError(f"--out {out}: profiles are read from .toml files, name it {out.stem}.toml")
        if not out.parent.is_dir():
            raise InputError(f"--out: the directory {out.parent} does not exist")
        return cls(out, model, hardware, quick)

    @property
    def measurements(self) -> Path:
        """Where the measurements go, beside the profile."""
        return self.out.with_suffix(".json")

    async def run(self, attach: str | None, model_path: Path | None, kv_tokens: int | None) -> None:
        """Measure, fit, print and write; the last line is JSON with the errors, as shares."""
        async with _open(attach, model_path, kv_tokens) as probe:
            points = choose_points(probe.limits, quick=self.quick)
            num_rounds = QUICK_ROUNDS if self.quick else ROUNDS
            with _progress((num_rounds + 1) * len(points)) as advance:
                measured = await probe.measure(points, num_rounds, advance)
            fit = fit_measured(measured, probe.limits.chunk_tokens)
            profile = self._profile(probe, fit, num_rounds)
        write_profile(self.out, profile)
        self.measurements.write_bytes(_results(profile, measured, fit))
        console = Console()
        console.print(_table(measured, fit))
        console.print(_coefficients(fit))
        console.print(f"wrote {self.out} and {self.measurements}", highlight=False, soft_wrap=True)
        print(orjson.dumps(_errors(fit)).decode())

    def _profile(self, probe: Probe, fit: Fit, num_rounds: int) -> Profile:
        info = probe.info
        return Profile(
            name=self.out.stem,
            kind="measured",
            hardware=self.hardware or f"{info.device}, not named",
            model=self.model or Path(info.model_path).name,
            source=SOURCE.format(version=info.version, points=len(fit.samples), rounds=num_rounds),
            error=_error_text(fit),
            kv_tokens=probe.limits.kv_tokens,
            chunk_tokens=probe.limits.chunk_tokens,
            step=fit.step,
            overhead_s=fit.overhead_s,
        )


def fit_measured(measured: Sequence[Measurement], chunk_tokens: int) -> Fit:
    """Return the costs that explain measurements of a server that prefills in chunks of that size."""
    return fit_costs([_sample(one, chunk_tokens) for one in measured])


@asynccontextmanager
async def _open(attach: str | None, model_path: Path | None, kv_tokens: int | None) -> AsyncIterator[Probe]:
    """Connect to the server at a URL, or to one that is started for the purpose."""
    if attach is None:
        (spec,) = launch_specs(model_path, 1, kv_tokens, None, ())
        async with launch_runtime(spec) as runtime, open_probe(runtime.info.url) as probe:
            yield probe
        return
    if model_path is not None or kv_tokens is not None:
        raise InputError("--attach uses a server as it runs: leave out --model-path and --kv-tokens")
    async with open_probe(attach) as probe:
        yield probe


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Show a bar on standard error; yields what advances it by one."""
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=total)
        yield lambda: progress.advance(task)


def _sample(measured: Measurement, chunk_tokens: int) -> Sample:
    """Return a measurement as the fit sees it: the iterations that the engine ran for it."""
    return Sample(
        kind=measured.point.kind,
        iterations=_iterations(measured.point, measured.context, chunk_tokens),
        engine_s=measured.engine_s,
        ttft_s=measured.ttft_s,
    )


def _iterations(point: Point, context: float, chunk_tokens: int) -> tuple[Iteration, ...]:
    if point.kind == "decode":
        return (Iteration(num_decodes=point.num_requests, context=round(context)),)
    if point.kind == "together":
        return (Iteration(prefills=((point.new_len, point.new_len),) * point.num_requests),)
    return prompt_iterations(point.new_len, point.cached_len, chunk_tokens)


def _table(measured: Sequence[Measurement], fit: Fit) -> Table:
    table = Table(title="measured against predicted", title_justify="left")
    table.add_column("what", no_wrap=True)
    for name in ("tokens", "measured ms", "predicted ms", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for one, sample in zip(measured, fit.samples, strict=True):
        seconds, predicted_s = fit.predict(sample)
        error = f"{predicted_s / seconds - 1:+.0%}"
        table.add_row(
            KINDS[sample.kind], str(one.point), f"{1e3 * seconds:.2f}", f"{1e3 * predicted_s:.2f}", error
        )
    return table


def _coefficients(fit: Fit) -> Table:
    table = Table(title="coefficients, in seconds", title_justify="left")
    table.add_column("name")
    table.add_column("value", justify="right")
    for name, value in {**asdict(fit.step), "overhead_s": fit.overhead_s}.items():
        if value:
            table.add_row(name, f"{value:.4g}")
    return table


def _errors(fit: Fit) -> dict[str, dict[str, float]]:
    return {
        kind: {"points": error.num_samples, "mean": round(error.mean, 4), "max": round(error.max, 4)}
        for kind, error in fit.errors().items()
    }


def _error_text(fit: Fit) -> str:
    parts = (
        f"{KINDS[kind]}: mean {error.mean:.1%}, at most {error.max:.0%} of {error.num_samples} points"
        for kind, error in fit.errors().items()
    )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _results(profile: Profile, measured: Sequence[Measurement], fit: Fit) -> bytes:
    """Return the measurements, the coefficients and the errors as JSON."""
    points = [
        asdict(one) | {"predicted_s": fit.predict(sample)[1]}
        for one, sample in zip(measured, fit.samples, strict=True)
    ]
    results = {"profile": asdict(profile), "errors": _errors(fit), "points": points}
    return orjson.dumps(results, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
