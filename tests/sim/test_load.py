"""Loads by name: what can be named can be played, twice alike; what cannot is refused in a line."""

from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, pstdev

import orjson
import pytest

from preble_sgl.errors import InputError
from preble_sgl.sim.load import MIN_REQUESTS, Load
from preble_sgl.sim.workloads import WORKLOADS, Session

NAMES = [*WORKLOADS, "azure_code", "azure_conv"]
ARRIVALS = ["poisson", "gamma:0.5", "gamma:3", "azure_code", "azure_conv"]

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.00,100,5
2023-11-16 18:17:07.00,200,6
2023-11-16 18:17:13.00,300,7
2023-11-16 18:17:23.00,400,8
"""


def beginning(load: Load, seed: int = 0, num: int = 5) -> tuple[list[Session], list[float]]:
    sessions, arrivals = load.play(seed)
    return list(islice(sessions, num)), list(islice(arrivals, num))


def load(workload: str = "toolbench", rps: float | None = 2.0, arrivals: str = "poisson") -> Load:
    return Load(workload=workload, rps=rps, arrivals=arrivals)


@pytest.fixture
def mooncake(tmp_path: Path) -> str:
    """Three requests at 0, 2 and 6 seconds; the first two begin with one block of 512 tokens."""
    rows = [(0, 600, 10, [1, 2]), (2000, 700, 20, [1, 3]), (6000, 10, 30, [4])]
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return str(path)


@pytest.fixture
def azure(tmp_path: Path) -> str:
    """Four requests at 0, 4, 10 and 20 seconds."""
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    return str(path)


@pytest.mark.parametrize("workload", NAMES)
def test_every_workload_plays_and_equal_seeds_are_equal_loads(workload: str) -> None:
    sessions, arrivals = beginning(load(workload))
    assert len(sessions) == 5
    assert arrivals == sorted(arrivals)
    assert beginning(load(workload)) == (sessions, arrivals)
    others, other_arrivals = beginning(load(workload), seed=1)
    assert others != sessions
    assert other_arrivals != arrivals


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_all_arrivals_have_the_rate_that_is_asked_for(arrivals: str) -> None:
    _, instants = beginning(load(arrivals=arrivals), num=20_000)
    tolerance = 0.25 if arrivals == "azure_code" else 0.05  # its gaps vary by 11 times their mean
    assert 20_000 / instants[-1] == pytest.approx(2.0, rel=tolerance)
    assert beginning(load(arrivals=arrivals), num=100)[1] == instants[:100]


def test_turns_count_as_requests() -> None:
    _, arrivals = load("alfworld", rps=47.9).play(0)
    *_, last = islice(arrivals, 5000)
    assert 5000 / last == pytest.approx(1.0, rel=0.05)


def test_what_is_asked_does_not_depend_on_when() -> None:
    slow, fast = beginning(load(rps=1.0)), beginning(load(rps=4.0))
    assert slow[0] == fast[0]
    assert slow[1] == pytest.approx([4 * at for at in fast[1]])


def test_a_load_lasts_as_long_as_it_says_but_has_enough_requests_for_a_percentile() -> None:
    assert Load(workload="toolbench", rps=10.0, duration_s=60.0).num_requests == 600
    assert Load(workload="toolbench", rps=10.0, duration_s=1.0).num_requests == MIN_REQUESTS == 200


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_every_workload_of_the_experiments_plays(workload: str) -> None:
    scaled = Load(workload=workload, rps=2.0, scale_gpus=2, zipf=1.2, shift_every=100)
    assert beginning(scaled) == beginning(scaled)
    assert beginning(scaled)[0] != beginning(load(workload))[0]


def test_a_popular_prefix_is_asked_more_often() -> None:
    def groups(zipf: float) -> int:
        sessions, _ = Load(workload="apps", rps=2.0, scale_gpus=2, zipf=zipf).play(0)
        return len({session.group for session in islice(sessions, 300)})

    assert groups(2.0) < groups(0.0) / 2


def test_a_trace_comes_as_it_was_recorded(mooncake: str, azure: str) -> None:
    sessions, arrivals = beginning(load(mooncake, rps=None))
    assert arrivals == [0.0, 2.0, 6.0]
    prompts = [session.turns[0].new for session in sessions]
    assert [len(prompt) for prompt in prompts] == [600, 700, 10]
    assert prompts[0][:512] == prompts[1][:512]
    assert load(mooncake, rps=None).num_requests == 3
    sessions, arrivals = beginning(load(azure, rps=None))
    assert arrivals == [0.0, 4.0, 10.0, 20.0]
    assert [len(session.turns[0].output) for session in sessions] == [5, 6, 7, 8]
    assert load(azure, rps=None).num_requests == 4


def test_a_trace_is_stretched_to_a_rate(mooncake: str, azure: str) -> None:
    assert beginning(load(mooncake, rps=1.0))[1] == [0.0, 1.0, 3.0]
    assert beginning(load(azure, rps=2.0))[1] == [0.0, 0.4, 1.0, 2.0]
    assert beginning(load(azure, rps=2.0))[0] == beginning(load(azure, rps=None))[0]
    assert load(azure, rps=2.0).num_requests == 4


def test_a_trace_of_one_instant_has_no_rate_to_stretch(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_text("".join(AZURE.splitlines(keepends=True)[:2]))
    assert beginning(load(str(path), rps=5.0))[1] == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "toolbox",
            "no workload 'toolbox'; there are toolbench, alfworld, apps, videoqa, loogle, azure_code",
        ),
        ("", "no workload ''; there are toolbench"),
        ("/no/such/trace.csv", "/no/such/trace.csv"),
    ],
)
def test_an_unknown_workload_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(name).play(0)
    assert "\n" not in str(caught.value)


def test_the_experiments_know_only_their_workloads() -> None:
    with pytest.raises(InputError, match="no workload 'toolbox'; there are toolbench, alfworld, apps"):
        Load(workload="toolbox", rps=1.0, scale_gpus=2).play(0)


@pytest.mark.parametrize(
    "name",
    ["", "uniform", "gamma", "gamma:", "gamma:x", "gamma:-1", "poisson:2", "azure_code:2", "gamma:1:2"],
)
def test_unknown_arrivals_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load(arrivals=name).play(0)
    assert str(caught.value) == (f"no arrivals {name!r}; there are poisson, gamma:CV, azure_code, azure_conv")


def test_gaps_that_do_not_vary_are_refused() -> None:
    with pytest.raises(InputError, match=r"cv=0.0: must be above 0"):
        load(arrivals="gamma:0").play(0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_rate_or_duration_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"rps={value}: must be above 0"):
        load(rps=value)
    with pytest.raises(InputError, match=f"duration_s={value}: must be above 0"):
        Load(workload="toolbench", rps=1.0, duration_s=value)


def test_a_workload_needs_a_rate() -> None:
    with pytest.raises(InputError, match=r"workload toolbench: give its requests per second \(--rps\)"):
        load(rps=None).play(0)


def test_bursts_are_gaps_that_vary() -> None:
    def deviation(arrivals: str) -> float:
        _, instants = beginning(load(arrivals=arrivals), num=2000)
        gaps = [b - a for a, b in pairwise(instants)]
        return pstdev(gaps) / fmean(gaps)

    assert deviation("gamma:0.5") == pytest.approx(0.5, rel=0.1)
    assert deviation("poisson") == pytest.approx(1.0, rel=0.1)
    assert deviation("gamma:3") == pytest.approx(3.0, rel=0.15)
