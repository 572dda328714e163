"""`preble-sgl simulate`: one line of JSON comes last, twice the same; bad input is one line and status 2."""

import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from preble_sgl import cli
from preble_sgl.commands import simulate, simulate_program
from preble_sgl.commands.simulate import parse_rates

SMALL = ("--workload", "alfworld", "--duration", 5, "--gpus", 2, "--jobs", 1)
TRACE = "".join(
    f'{{"timestamp": {100 * i}, "input_length": 600, "output_length": 20, "hash_ids": [{i % 3}, {10 + i}]}}\n'
    for i in range(12)
)
QA = str(Path(__file__).parent.parent / "programs" / "document_qa.py")

Capture = pytest.CaptureFixture[str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `preble-sgl simulate` in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["preble-sgl", "simulate", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def answer(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *arguments: object) -> dict[str, Any]:
    """Return the JSON of a run that succeeds."""
    assert run(monkeypatch, *arguments) == 0
    found: dict[str, Any] = orjson.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where plots may be left."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve requests in 1.1 seconds, which share three first blocks of 512 tokens."""
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three documents with two questions each."""
    path = tmp_path / "rows.jsonl"
    documents = [f"{name} " * 300 for name in ("red", "green", "blue")]
    path.write_bytes(
        b"\n".join(orjson.dumps({"document": one, "questions": ["Why?", "Who?"]}) for one in documents)
    )
    return path


def test_every_policy_seed_and_rate_is_a_point(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options = (*SMALL, "--policy", "preble_e2, round_robin", "--rps", "5:15:5", "--seeds", 2)
    points = answer(monkeypatch, capsys, *options)["points"]
    assert [(point["rps"], point["policy"], point["seed"]) for point in points] == [
        (rps, policy, seed)
        for rps in (5.0, 10.0, 15.0)
        for policy in ("preble_e2", "round_robin")
        for seed in (0, 1)
    ]
    for point in points:
        assert (point["workload"], point["gpus"], point["profile"]) == ("alfworld", 2, "a6000-mistral-7b")
        assert 200 <= point["finished"] < 250  # the last episodes, of at most 50 turns, are not broken off
        assert point["failed"] == 0
        assert 0 < point["mean_ttft_s"] < point["mean_e2e_s"] < point["p99_e2e_s"]
        assert 0.5 < point["hit_rate"] < 1
    assert points[0]["mean_e2e_s"] != points[1]["mean_e2e_s"]


def test_a_command_gives_the_same_points_every_time(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options = (*SMALL, "--policy", "power_of_two,preble_plan", "--rps", 5)
    assert answer(monkeypatch, capsys, *options) == answer(monkeypatch, capsys, *options)


def test_processes_do_not_change_the_points(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options = (*SMALL[:-2], "--policy", "preble_plan,round_robin", "--rps", "5,40")
    alone = answer(monkeypatch, capsys, *options, "--jobs", 1)
    assert answer(monkeypatch, capsys, *options, "--jobs", 2) == alone
    assert [point["rps"] for point in alone["points"]] == [5.0, 5.0, 40.0, 40.0]


@pytest.mark.parametrize(
    "options",
    [
        ("--order", "fcfs"),
        ("--mixed-chunk",),
        ("--page-size", 64),
        ("--kv-tokens", 8000),
        ("--arrivals", "gamma:4"),
        ("--profile", "h100-llama3-8b"),
        ("--gpus", 1),
    ],
)
def test_options_change_the_outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, options: tuple[object, ...]
) -> None:
    def outcome(*more: object) -> float:
        asked = ("--workload", "toolbench", "--policy", "round_robin", "--rps", 30, "--jobs", 1)
        (point,) = answer(monkeypatch, capsys, *asked, "--duration", 5, "--gpus", 2, *more)["points"]
        mean_e2e_s: float = point["mean_e2e_s"]
        return mean_e2e_s

    assert outcome(*options) != outcome()


def test_what_is_shown_is_said_to_be_simulated(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert run(monkeypatch, *SMALL, "--policy", "preble_e2", "--rps", 5, "--seeds", 2) == 0
    text = capsys.readouterr().out
    assert "simulated, not measured; a6000-mistral-7b: measured." in text
    assert "alfworld" in text


def test_without_a_name_the_plot_is_simulate_svg_and_it_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib")
    answer(monkeypatch, capsys, *SMALL, "--policy", "sticky", "--rps", 5, "--no-plot")
    assert not Path("simulate.svg").exists()
    answer(monkeypatch, capsys, *SMALL, "--policy", "sticky", "--rps", 5)
    assert Path("simulate.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(("name", "magic"), [("plot.svg", b"<?xml"), ("plot.png", b"\x89PNG")])
def test_a_plot_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path, name: str, magic: bytes
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / name
    options = (*SMALL, "--policy", "preble_e2,round_robin", "--rps", "5,10", "--plot", plot)
    assert len(answer(monkeypatch, capsys, *options)["points"]) == 4
    assert plot.read_bytes().startswith(magic)


def test_a_trace_is_replayed_at_its_own_rate_or_another(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, trace: Path
) -> None:
    options = ("--policy", "round_robin", "--gpus", 1, "--jobs", 1, "--replay", trace)
    (own,) = answer(monkeypatch, capsys, *options)["points"]
    slow, fast = answer(monkeypatch, capsys, *options, "--rps", "0.1,1000")["points"]
    assert [point["rps"] for point in (own, slow, fast)] == [None, 0.1, 1000.0]
    assert [point["finished"] for point in (own, slow, fast)] == [12, 12, 12]
    assert own["workload"] == str(trace)
    assert slow["hit_rate"] == 9 * 512 / (12 * 600)
    assert slow["makespan_s"] > 110
    assert slow["mean_e2e_s"] < own["mean_e2e_s"] < fast["mean_e2e_s"]


def test_a_replay_is_plotted_too(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, trace: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    options = ("--policy", "round_robin", "--jobs", 1, "--replay", trace, "--plot", plot)
    assert len(answer(monkeypatch, capsys, *options)["points"]) == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_program_runs_its_rows_under_every_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tiny_model: Path, rows: Path
) -> None:
    monkeypatch.setattr(simulate_program, "default_model", lambda: tiny_model)
    options = ("--program", QA, "--rows", rows, "--policy", "preble_plan,round_robin", "--gpus", 2)
    found = answer(monkeypatch, capsys, *options)
    kept, spread = found["programs"]
    assert [(one["policy"], one["seed"]) for one in (kept, spread)] == [
        ("preble_plan", 0),
        ("round_robin", 0),
    ]
    assert [(one["finished"], one["failed"]) for one in (kept, spread)] == [(6, 0), (6, 0)]
    assert kept["computed_tokens"] < spread["computed_tokens"]
    assert kept["hit_rate"] > spread["hit_rate"]
    assert answer(monkeypatch, capsys, *options) == found


def test_a_program_whose_row_fails_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tiny_model: Path, tmp_path: Path
) -> None:
    program, rows = tmp_path / "digits.py", tmp_path / "rows.jsonl"
    program.write_text(
        "import preble_sgl as ps\n@ps.program\nasync def digits(s: ps.State) -> str:\n"
        '    s += ps.user("A number?")\n    return await s.gen(regex="[0-9]+", max_tokens=4)\n'
    )
    rows.write_text("{}\n")
    monkeypatch.setattr(simulate_program, "default_model", lambda: tiny_model)
    assert run(monkeypatch, "--program", program, "--rows", rows, "--policy", "round_robin") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "call digits[0]/call0: a regex needs a script" in line


SLO_S = 6.0
BUSY = ("--workload", "toolbench", "--duration", 5, "--rps", 20, "--jobs", 1, "--seeds", 2)


def test_what_if_finds_the_fewest_workers(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def p99_s(policy: str, gpus: int) -> float:
        points = answer(monkeypatch, capsys, *BUSY, "--policy", policy, "--gpus", gpus)["points"]
        return sum(float(point["p99_e2e_s"]) for point in points) / 2

    options = (*BUSY, "--what-if", "--slo-p99", SLO_S, "--policy", "preble_e2,round_robin")
    found = answer(monkeypatch, capsys, *options)
    assert (found["slo"], found["rps"]) == ({"p99_e2e_s": SLO_S}, 20.0)
    assert list(found["gpus"]) == ["preble_e2", "round_robin"]
    assert 1 < found["gpus"]["preble_e2"] < found["gpus"]["round_robin"]
    for policy, gpus in found["gpus"].items():
        assert p99_s(policy, gpus) <= SLO_S < p99_s(policy, gpus - 1)


def test_what_if_says_when_no_number_of_workers_is_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(simulate, "MAX_GPUS", 2)
    assert run(monkeypatch, *BUSY, "--what-if", "--slo-p99", 0.001, "--policy", "round_robin") == 0
    text = capsys.readouterr().out
    assert "more than 2" in text
    assert orjson.loads(text.splitlines()[-1])["gpus"] == {"round_robin": None}


def test_one_worker_may_be_enough_for_both_bounds(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    options = (*SMALL, "--rps", 1, "--what-if", "--slo-p99", 100, "--slo-ttft", 50, "--policy", "preble_e2")
    found = answer(monkeypatch, capsys, *options)
    assert found["gpus"] == {"preble_e2": 1}
    assert found["slo"] == {"p99_e2e_s": 100.0, "p99_ttft_s": 50.0}


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("10", [10.0]),
        ("1,2,4", [1.0, 2.0, 4.0]),
        ("5:15:5", [5.0, 10.0, 15.0]),
        ("5:14:5", [5.0, 10.0]),
        ("3:3:1", [3.0]),
        ("0.1:0.3:0.1", pytest.approx([0.1, 0.2, 0.3])),
    ],
)
def test_rates_are_one_or_several_or_a_range(text: str, rates: list[float]) -> None:
    assert parse_rates(text) == rates


RPS = ("--rps", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RPS, "--policy", "best"), "best"),
        ((*RPS, "--policy", ","), "--policy: give at least one policy"),
        ((*RPS, "--policy", "sticky@0"), "after @ comes the number of open programs, 1 or more"),
        ((*RPS, "--profile", "abacus"), "there is no profile abacus: give one of a100-mistral-7b"),
        ((*RPS, "--workload", "chess"), "no workload 'chess'; there are toolbench, alfworld"),
        ((*RPS, "--arrivals", "never"), "no arrivals 'never'; there are poisson"),
        ((*RPS, "--duration", "0"), "duration_s=0.0: must be above 0"),
        ((*RPS, "--duration", "inf"), "duration_s=inf: must be above 0"),
        ((), "give --rps, the requests per second, or a trace with --replay"),
        (("--rps", "many"), "--rps many: give a rate, several as 1,2,4, or first:last:step"),
        (("--rps", "5:1:1"), "--rps 5:1:1: give a rate"),
        (("--rps", "1:5:0"), "--rps 1:5:0: give a rate"),
        (("--rps", "1:5"), "--rps 1:5: give a rate"),
        (("--rps", "1:inf:1"), "--rps 1:inf:1: give a rate"),
        (("--rps", "0"), "rps=0.0: must be above 0"),
        (("--rps", "5,-1"), "rps=-1.0: must be above 0"),
        (("--rps", "inf"), "rps=inf: must be above 0"),
        (("--replay", "/no/such/trace.csv"), "--replay: /no/such/trace.csv does not exist"),
        ((*RPS, "--seeds", "0"), "--seeds 0: at least 1 is needed"),
        ((*RPS, "--gpus", "0"), "gpus=0: at least 1 is needed"),
        ((*RPS, "--jobs", "0"), "jobs=0: at least 1 is needed"),
        ((*RPS, "--page-size", "0"), "page_size=0, must be 1 or more"),
        ((*RPS, "--kv-tokens", "0"), "--kv-tokens 0: at least 1 is needed"),
        ((*RPS, "--order", "lifo"), "--order lifo: give one of fcfs, lpm, preble_groups"),
        ((*RPS, "--objective", "fun"), "--objective fun: give one of latency, throughput"),
        ((*RPS, "--objective", "latency", "--policy", "sticky"), "objective 'latency' is for preble_plan"),
        ((*RPS, "--plot", "/no/such/place/plot.svg"), "--plot: the directory /no/such/place does not exist"),
        ((*RPS, "--plot", "plot.docx"), "--plot plot.docx: the name must end in one of .svg, .png, .pdf"),
        ((*RPS, "--what-if"), "--what-if needs an SLO: give --slo-p99 or --slo-ttft, in seconds"),
        (("--rps", "5,6", "--what-if", "--slo-p99", "1"), "--what-if is about one load: give one rate"),
        ((*RPS, "--what-if", "--slo-p99", "1", "--jobs", "0"), "jobs=0: at least 1 is needed"),
        (("--program", QA), "--program and --rows go together: a program file, and its arguments"),
        (("--rows", "rows.jsonl"), "--program and --rows go together: a program file, and its arguments"),
        (
            ("--program", QA, "--rows", "rows.jsonl", *RPS),
            "--program runs its rows as one batch: leave out --rps, --replay and --what-if",
        ),
        (("--program", QA, "--rows", "none.jsonl"), "none.jsonl does not exist"),
        (("--program", "none.py", "--rows", "none.jsonl"), "none.py does not exist"),
    ],
)
def test_what_cannot_work_is_one_clear_line_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_a_bad_trace_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b,c\n1,2,3\n")
    assert run(monkeypatch, "--replay", broken) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{broken}: not a trace" in line


def test_a_trace_of_another_name_is_told_apart_from_a_workload(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text(TRACE)
    assert run(monkeypatch, "--replay", trace) == 2
    assert "the name of a trace must end in .jsonl, .json or .csv" in capsys.readouterr().err
