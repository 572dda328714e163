"""The options of `preble-sgl simulate`, checked before anything runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from preble_sgl.commands.simulate import Slo, how_many_gpus, parse_names, parse_rates, simulate_points
from preble_sgl.errors import InputError
from preble_sgl.global_sched.admission import Objective
from preble_sgl.profiles import load_profile
from preble_sgl.sim.load import TRACE_SUFFIXES, Load
from preble_sgl.sim.points import Setting
from preble_sgl.sim.virtual_time import VirtualTime
from preble_sgl.sim.wait_queue import WaitOrder

PLOT_FORMATS = (".svg", ".png", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What the command line says, as it says it."""

    policy: str
    workload: str
    rps: str | None
    replay: Path | None
    program: str | None
    rows: Path | None
    gpus: int
    profile: str
    seeds: int
    duration: float
    arrivals: str
    order: str
    mixed_chunk: bool
    page_size: int
    kv_tokens: int | None
    cache_events: bool
    objective: str
    what_if: bool
    slo_p99: float | None
    slo_ttft: float | None
    plot: Path
    no_plot: bool
    jobs: int | None

    def run(self) -> None:
        """Simulate what is asked for. Raises InputError for what cannot work, before anything runs."""
        self._check_plot()
        settings = self._settings()
        for setting in settings:
            setting.fleet(VirtualTime())  # finds what does not go together before any process does
        if self.program is not None or self.rows is not None:
            self._run_program(settings)
        elif self.what_if:
            how_many_gpus(settings, self._one_load(), self._slo(), jobs=self.jobs)
        else:
            simulate_points(settings, self._loads(), jobs=self.jobs, plot=None if self.no_plot else self.plot)

    def _check_plot(self) -> None:
        if self.no_plot:
            return
        if not self.plot.parent.is_dir():
            raise InputError(f"--plot: the directory {self.plot.parent} does not exist")
        if self.plot.suffix not in PLOT_FORMATS:
            raise InputError(f"--plot {self.plot}: the name must end in one of {', '.join(PLOT_FORMATS)}")

    def _settings(self) -> list[Setting]:
        if self.seeds < 1:
            raise InputError(f"--seeds {self.seeds}: at least 1 is needed")
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise InputError(f"--kv-tokens {self.kv_tokens}: at least 1 is needed")
        profile = load_profile(self.profile)
        return [
            Setting(
                policy=policy,
                gpus=self.gpus,
                profile=profile,
                seed=seed,
                order=_one_of(self.order, WaitOrder, "--order"),
                mixed_chunk=self.mixed_chunk,
                page_size=self.page_size,
                kv_tokens=self.kv_tokens,
                objective=_one_of(self.objective, Objective, "--objective"),
                cache_events=self.cache_events,
            )
            for policy in parse_names(self.policy)
            for seed in range(self.seeds)
        ]

    def _loads(self) -> list[Load]:
        if self.replay is not None and not self.replay.is_file():
            raise InputError(f"--replay: {self.replay} does not exist")
        if self.replay is not None and self.replay.suffix not in TRACE_SUFFIXES:
            raise InputError(f"--replay {self.replay}: the name of a trace must end in .jsonl, .json or .csv")
        if self.replay is None and self.rps is None:
            raise InputError("give --rps, the requests per second, or a trace with --replay")
        source = self.workload if self.replay is None else str(self.replay)
        rates: list[float | None] = [None] if self.rps is None else [*parse_rates(self.rps)]
        loads = [
            Load(workload=source, rps=rate, duration_s=self.duration, arrivals=self.arrivals)
            for rate in rates
        ]
        loads[0].play(seed=0)  # finds a bad name or trace before any process does
        return loads

    def _one_load(self) -> Load:
        loads = self._loads()
        if len(loads) != 1:
            raise InputError("--what-if is about one load: give one rate with --rps")
        return loads[0]

    def _slo(self) -> Slo:
        named = (("p99_e2e_s", self.slo_p99), ("p99_ttft_s", self.slo_ttft))
        bounds = tuple((metric, bound) for metric, bound in named if bound is not None)
        if not bounds:
            raise InputError("--what-if needs an SLO: give --slo-p99 or --slo-ttft, in seconds")
        return Slo(bounds=bounds)

    def _run_program(self, settings: list[Setting]) -> None:
        from preble_sgl.commands.simulate_program import simulate_program

        if self.program is None or self.rows is None:
            raise InputError("--program and --rows go together: a program file, and its arguments")
        if self.rps is not None or self.replay is not None or self.what_if:
            raise InputError("--program runs its rows as one batch: leave out --rps, --replay and --what-if")
        simulate_program(self.program, self.rows, settings)


def _one_of(value: str, choices: Any, option: str) -> Any:
    known = get_args(choices)
    if value not in known:
        raise InputError(f"{option} {value}: give one of {', '.join(known)}")
    return value
