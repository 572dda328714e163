"""The tables of docs/results-simulated.md are what the renderer makes of the committed results."""

from pathlib import Path

import pytest

from benchmarks.report import DOCUMENT, RESULTS, render
from benchmarks.rows import Cell, Row, Study, beats, cells, ratio, simple_wins
from benchmarks.tables import TABLES
from preble_sgl.errors import InputError

ROOT = Path(__file__).parent.parent


def row(policy: str, seed: int, mean_s: float, *, p99_s: float = 1.0) -> Row:
    return Row(
        hardware="2xa6000",
        workload="apps",
        variant="lpm",
        rps=1.0,
        policy=policy,
        seed=seed,
        mean_s=mean_s,
        p99_s=p99_s,
        ttft_s=0.1,
        tpot_s=0.01,
        hit_rate=0.5,
        imbalance=1.0,
        failed=0,
    )


def test_the_committed_document_is_what_the_committed_results_render_to() -> None:
    document = (ROOT / DOCUMENT).read_text()
    assert render(document, ROOT / RESULTS) == document, "run python -m benchmarks.report"


def test_a_missing_result_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run python -m benchmarks\.experiments\.preble_figure3"):
        render((ROOT / DOCUMENT).read_text(), tmp_path)


@pytest.mark.parametrize("name", ["runs", "azure"])
def test_a_document_without_a_place_for_a_table_is_refused(name: str) -> None:
    assert name in TABLES
    document = (ROOT / DOCUMENT).read_text().replace(f"<!-- end {name} -->", "")
    with pytest.raises(InputError, match=f"<!-- begin {name} --> and <!-- end {name} --> once"):
        render(document, ROOT / RESULTS)


def test_what_stands_between_other_markers_is_left_alone() -> None:
    other = "<!-- begin other -->\nby hand\n<!-- end other -->\n"
    document = (ROOT / DOCUMENT).read_text() + other
    assert render(document, ROOT / RESULTS).endswith(other)


def test_a_study_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    study = Study({"command": "a", "seeds": 2}, [row("sticky", seed, 1.5) for seed in range(2)])
    study.write(tmp_path / "a.json")
    assert Study.read(tmp_path / "a.json") == study


def test_a_policy_beats_another_only_if_it_is_better_in_every_seed_and_by_a_margin() -> None:
    base = [row("a", 0, 2.0), row("a", 1, 3.0)]
    assert beats([row("b", 0, 1.9), row("b", 1, 2.9)], base, "mean_s")
    assert not beats([row("b", 0, 1.0), row("b", 1, 3.1)], base, "mean_s")
    assert not beats([row("b", 0, 1.99), row("b", 1, 2.99)], base, "mean_s")
    assert ratio(base, [row("b", 0, 1.0), row("b", 1, 1.5)], "mean_s") == 2.0


def test_wins_of_simple_baselines_are_found_with_their_factor() -> None:
    policies = ("preble_e2", "preble_plan", "cache_aware", "sticky", "consistent_hash", "lmetric")
    seconds = dict.fromkeys(policies, 2.0) | {"preble_plan": 1.0, "sticky": 1.6}
    (win,) = simple_wins(cells(row(policy, 0, seconds[policy]) for policy in policies))
    assert win == (Cell("2xa6000", "apps", "lpm", 1.0), "mean_s", "preble_e2", "sticky", 1.25)
