"""Program profiles: what a second run knows of the first, and what a file holds after two learn at once."""

import random
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE

import pytest

from preble_sgl.dsl import program_profile
from preble_sgl.dsl.program_profile import ProgramProfile, RunningMean
from preble_sgl.errors import InputError, PrebleError

SITE = "judge.py:14"
YES_NO = ("yes", "no")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "profile.sqlite"


def taught() -> ProgramProfile:
    """Return a profile that has learnt a little of each kind."""
    profile = ProgramProfile()
    profile.learn_branch("judge", SITE, 0, "yes")
    profile.learn_branch("judge", SITE, 0, "yes", weight=0.5)
    profile.learn_branch("judge", SITE, 1, "no")
    profile.learn_output("judge", SITE, 10)
    profile.learn_output("judge", SITE, 25)
    profile.learn_tool("search", 0.25)
    profile.learn_tool("search", 0.75)
    return profile


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


# What a profile answers


def test_nothing_is_known_of_what_was_never_seen() -> None:
    profile = ProgramProfile()
    assert profile.output_len("judge", SITE) is None
    assert profile.tool_s("search") is None
    assert profile.tool_quantile_s("search", 0.5) is None
    assert profile.weights("judge", SITE, 0, ("a", "b", "c", "d")) == (0.25, 0.25, 0.25, 0.25)
    assert profile.weights("judge", SITE, 0, ()) == ()


def test_one_is_added_to_what_was_seen_of_each_option() -> None:
    profile = ProgramProfile()
    for option in ("a", "a", "a", "b"):
        profile.learn_branch("judge", SITE, 2, option)
    assert profile.weights("judge", SITE, 2, ("a", "b", "c")) == (4 / 7, 2 / 7, 1 / 7)
    assert profile.weights("judge", SITE, 2, ("c", "a")) == (1 / 5, 4 / 5)


def test_a_time_at_a_site_that_was_never_seen_is_judged_by_all_others() -> None:
    profile = taught()
    assert profile.weights("judge", SITE, 0, YES_NO) == (2.5 / 3.5, 1 / 3.5)
    assert profile.weights("judge", SITE, 1, YES_NO) == (1 / 3, 2 / 3)
    assert profile.weights("judge", SITE, 2, YES_NO) == (2.5 / 4.5, 2 / 4.5)
    assert profile.weights("judge", SITE, 0, ("no", "perhaps")) == (2 / 3, 1 / 3)


def test_programs_and_sites_do_not_mix() -> None:
    profile = taught()
    assert profile.weights("grade", SITE, 0, YES_NO) == (0.5, 0.5)
    assert profile.weights("judge", "judge.py:15", 0, YES_NO) == (0.5, 0.5)
    assert profile.output_len("grade", SITE) is None


def test_output_lengths_and_durations_are_means() -> None:
    profile = taught()
    assert profile.output_len("judge", SITE) == 17.5
    assert profile.outputs == {("judge", SITE): RunningMean(2, 35)}
    assert profile.tool_s("search") == 0.5


def test_a_quantile_lies_between_two_durations() -> None:
    profile = ProgramProfile()
    for duration_s in (4.0, 1.0, 3.0, 2.0, 10.0):
        profile.learn_tool("search", duration_s)
    quantiles = [profile.tool_quantile_s("search", q) for q in (0, 0.25, 0.5, 0.875, 1)]
    assert quantiles == [1.0, 2.0, 3.0, 7.0, 10.0]


def test_only_the_last_durations_count(path: Path) -> None:
    profile = ProgramProfile()
    for duration_s in range(200):
        profile.learn_tool("search", duration_s)
    assert list(profile.tools["search"]) == list(range(72, 200))
    profile.save(path)
    profile.learn_tool("search", 1000)
    profile.save(path)
    assert list(ProgramProfile.load(path).tools["search"]) == [*range(73, 200), 1000]
    assert ProgramProfile.load(path).tool_quantile_s("search", 0) == 73
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM durations").fetchone() == (128,)


# The file


def same(profile: ProgramProfile, other: ProgramProfile) -> bool:
    return (profile.branches, profile.outputs, profile.tools) == (other.branches, other.outputs, other.tools)


def test_a_missing_or_empty_file_is_an_empty_profile(path: Path) -> None:
    assert same(ProgramProfile.load(path), ProgramProfile())
    assert not path.exists()
    path.touch()
    assert same(ProgramProfile.load(path), ProgramProfile())


def test_a_profile_is_the_same_when_it_is_loaded_again(path: Path) -> None:
    profile = taught()
    profile.save(path)
    loaded = ProgramProfile.load(path)
    assert same(loaded, profile)
    assert loaded.weights("judge", SITE, 2, YES_NO) == profile.weights("judge", SITE, 2, YES_NO)


def test_what_was_saved_is_not_added_again(path: Path) -> None:
    profile = taught()
    profile.save(path)
    profile.save(path)
    ProgramProfile.load(path).save(path)
    assert same(ProgramProfile.load(path), profile)


def test_what_two_learn_at_once_adds_up(path: Path) -> None:
    taught().save(path)
    first, second = ProgramProfile.load(path), ProgramProfile.load(path)
    for profile, num_tokens in ((first, 1), (second, 2)):
        profile.learn_branch("judge", SITE, 0, "yes")
        profile.learn_output("judge", SITE, num_tokens)
        profile.learn_tool("search", num_tokens)
    second.save(path)
    first.save(path)
    merged = ProgramProfile.load(path)
    assert merged.branches["judge", SITE, 0, "yes"] == 3.5
    assert merged.outputs["judge", SITE] == RunningMean(4, 38)
    assert list(merged.tools["search"]) == [0.25, 0.75, 2, 1]


def test_processes_that_save_at_once_lose_nothing(path: Path) -> None:
    code = (
        "import sys; from preble_sgl.dsl.program_profile import ProgramProfile\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(50):\n"
        "    profile = ProgramProfile.load(sys.argv[1])\n"
        "    profile.learn_output('judge', 'judge.py:14', i)\n"
        "    profile.save(sys.argv[1])"
    )
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", code, path], stdin=PIPE, stdout=PIPE))
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert ProgramProfile.load(path).outputs["judge", SITE] == RunningMean(150, 3 * sum(range(50)))


def test_a_file_that_is_locked_fails_and_is_saved_to_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_profile, "LOCK_TIMEOUT_S", 0.0)
    profile = taught()
    execute(path, "PRAGMA user_version = 0")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(PrebleError, match=r"cannot be read or written now .*locked"):
            profile.save(path)
        with pytest.raises(PrebleError, match=r"cannot be read or written now .*locked"):
            ProgramProfile.load(path)
    profile.save(path)
    assert same(ProgramProfile.load(path), profile)


def refused(path: Path, message: str) -> None:
    """Check that a file is neither read nor written."""
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        ProgramProfile.load(path)
    with pytest.raises(InputError, match=message):
        taught().save(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_text("my notes " * 100)
    message = r"profile\.sqlite: cannot be used .*not a database.*: give another file, or delete it"
    refused(path, message)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["CREATE TABLE notes (text)"], "a database, but not a program profile"),
        (["CREATE TABLE notes (text)", "PRAGMA user_version = 1"], "no such table: branches"),
        (["PRAGMA user_version = 2"], "program profile of version 2, only 1 is known"),
    ],
)
def test_another_database_and_another_version_are_refused(
    path: Path, statements: Iterable[str], message: str
) -> None:
    execute(path, *statements)
    refused(path, message)


def test_a_damaged_profile_is_refused(path: Path) -> None:
    profile = taught()
    for site in range(1000):
        profile.learn_output("judge", f"judge.py:{site}", 1)
    profile.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * (len(whole) - 8192))
    refused(path, r"cannot be used as a program profile .*malformed")


def test_a_path_that_can_be_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used as a program profile"):
        ProgramProfile.load(tmp_path)
    with pytest.raises(InputError, match="missing/profile: cannot be used as a program profile"):
        taught().save(tmp_path / "missing" / "profile")


# Against a naive model


@dataclass
class Naive:
    """All that was ever learnt, in lists; every answer is counted from the start."""

    branches: list[tuple[str, int, str, int]] = field(default_factory=list)
    outputs: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    tools: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: "Naive") -> None:
        self.branches += other.branches
        for site, lengths in other.outputs.items():
            self.outputs[site] += lengths
        for tool, durations in other.tools.items():
            self.tools[tool] += durations

    def weights(self, site: str, occurrence: int, options: list[str]) -> list[float]:
        seen = [b for b in self.branches if b[0] == site and b[2] in options]
        seen = [b for b in seen if b[1] == occurrence] or seen
        counts = [1 + sum(weight for *_, option, weight in seen if option == o) for o in options]
        return [count / sum(counts) for count in counts]


@pytest.mark.parametrize("seed", range(30))
def test_two_learners_and_a_file_against_lists(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    in_file = Naive()
    learners = [(ProgramProfile(), Naive(), Naive()) for _ in range(2)]
    for _ in range(150):
        which = rng.randrange(2)
        profile, known, unsaved = learners[which]
        action = rng.random()
        if action < 0.9:
            _learn(rng, profile, [known, unsaved])
        elif action < 0.96:
            profile.save(path)
            in_file.add(unsaved)
            learners[which] = (profile, known, Naive())
        else:
            known = Naive()
            known.add(in_file)
            learners[which] = (ProgramProfile.load(path), known, Naive())
        _compare(rng, *learners[which][:2])
    _compare(rng, ProgramProfile.load(path), in_file)


def _learn(rng: random.Random, profile: ProgramProfile, models: list[Naive]) -> None:
    site, occurrence, option = rng.choice("ab"), rng.randrange(3), rng.choice("xyz")
    tokens, duration_s, weight = rng.randrange(100), rng.randrange(100), rng.randint(1, 3)
    kind = rng.randrange(3)
    if kind == 0:
        profile.learn_branch("p", site, occurrence, option, weight)
    elif kind == 1:
        profile.learn_output("p", site, tokens)
    else:
        profile.learn_tool(site, duration_s)
    for model in models:
        if kind == 0:
            model.branches.append((site, occurrence, option, weight))
        elif kind == 1:
            model.outputs[site].append(tokens)
        else:
            model.tools[site].append(duration_s)


def _compare(rng: random.Random, profile: ProgramProfile, model: Naive) -> None:
    site, occurrence = rng.choice("abc"), rng.randrange(4)
    options = rng.sample("wxyz", rng.randint(1, 4))
    weights = profile.weights("p", site, occurrence, options)
    assert weights == pytest.approx(model.weights(site, occurrence, options))
    assert sum(weights) == pytest.approx(1)
    lengths = model.outputs.get(site)
    assert profile.output_len("p", site) == (sum(lengths) / len(lengths) if lengths else None)
    assert list(profile.tools.get(site, ())) == model.tools.get(site, [])[-128:]
