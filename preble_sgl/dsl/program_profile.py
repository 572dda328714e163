"""What earlier runs of a program teach a later plan, kept in a small SQLite file.

Three tables. *Branches*: which option was taken at a call site, by how often the site had been reached in
that run, because the third turn of a loop ends otherwise than the first. *Outputs*: tokens that a call site
generated. *Tools*: how long a tool took, the last durations only, because tools change. A call site is a
place in the program's text, such as `judge.py:14`.

Saving adds what was learnt since loading to what the file holds by then, in one transaction, so processes
that learn at once lose nothing. All of it is advice: a wrong profile costs time, never correctness.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from preble_sgl.errors import InputError, PrebleError

if TYPE_CHECKING:
    import sqlite3

VERSION = 1
NUM_DURATIONS = 128
LOCK_TIMEOUT_S = 30.0
REMEDY = "give another file, or delete it"

SCHEMA = (
    """CREATE TABLE branches (
        program TEXT, site TEXT, occurrence INTEGER, option TEXT, weight REAL NOT NULL,
        PRIMARY KEY (program, site, occurrence, option)
    ) WITHOUT ROWID""",
    """CREATE TABLE outputs (
        program TEXT, site TEXT, count INTEGER NOT NULL, total REAL NOT NULL,
        PRIMARY KEY (program, site)
    ) WITHOUT ROWID""",
    "CREATE TABLE durations (id INTEGER PRIMARY KEY, tool TEXT NOT NULL, duration_s REAL NOT NULL)",
    "CREATE INDEX durations_of_tool ON durations (tool, id)",
    f"PRAGMA user_version = {VERSION}",
)
ADD_BRANCH = """
    INSERT INTO branches VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (program, site, occurrence, option) DO UPDATE SET weight = weight + excluded.weight"""
ADD_OUTPUT = """
    INSERT INTO outputs VALUES (?, ?, ?, ?)
    ON CONFLICT (program, site) DO UPDATE
    SET count = count + excluded.count, total = total + excluded.total"""
ADD_DURATION = "INSERT INTO durations (tool, duration_s) VALUES (?, ?)"
DROP_OLD_DURATIONS = f"""
    DELETE FROM durations WHERE tool = ?1 AND id NOT IN
    (SELECT id FROM durations WHERE tool = ?1 ORDER BY id DESC LIMIT {NUM_DURATIONS})"""

Branch: TypeAlias = tuple[str, str, int, str]
"""Program, call site, how often the site had been reached before in the run, option taken."""


@dataclass(frozen=True, slots=True)
class RunningMean:
    """The mean of numbers that come one by one."""

    count: int = 0
    total: float = 0.0

    @property
    def mean(self) -> float:
        """The mean so far. Raises ZeroDivisionError before the first number."""
        return self.total / self.count

    def __add__(self, other: "RunningMean") -> "RunningMean":
        return RunningMean(self.count + other.count, self.total + other.total)


@dataclass(slots=True)
class _Counters:
    """Sums of what was learnt. `sites` sums the branches of a site over its occurrences."""

    branches: dict[Branch, float] = field(default_factory=dict)
    sites: dict[tuple[str, str, str], float] = field(default_factory=dict)
    outputs: dict[tuple[str, str], RunningMean] = field(default_factory=dict)
    tools: dict[str, deque[float]] = field(default_factory=dict)

    def add_branch(self, branch: Branch, weight: float) -> None:
        program, site, _, option = branch
        self.branches[branch] = self.branches.get(branch, 0.0) + weight
        self.sites[program, site, option] = self.sites.get((program, site, option), 0.0) + weight

    def add_output(self, key: tuple[str, str], lengths: RunningMean) -> None:
        self.outputs[key] = self.outputs.get(key, RunningMean()) + lengths

    def add_duration(self, tool: str, duration_s: float) -> None:
        self.tools.setdefault(tool, deque(maxlen=NUM_DURATIONS)).append(duration_s)


class ProgramProfile:
    """Branch weights, output lengths and tool durations, from a file and from what was learnt since."""

    __slots__ = ("_known", "_unsaved")

    def __init__(self) -> None:
        self._known = _Counters()
        self._unsaved = _Counters()

    @classmethod
    def load(cls, path: str | Path) -> "ProgramProfile":
        """Read a file; a missing one is an empty profile.

        Raises InputError when the file is something else or of another version, PrebleError when it cannot
        be read now.
        """
        profile = cls()
        if Path(path).exists():
            with _transaction(Path(path), "BEGIN") as connection:
                if _has_tables(Path(path), connection):
                    _read(connection, profile._known)
        return profile

    def save(self, path: str | Path) -> None:
        """Add what was learnt since loading, or since the last saving, to a file; begin it if it is missing.

        What others have added meanwhile stays, and shows when the file is loaded again. Raises as `load`
        does; then nothing was added, and saving again adds all of it.
        """
        with _transaction(Path(path), "BEGIN IMMEDIATE") as connection:
            if not _has_tables(Path(path), connection):
                for statement in SCHEMA:
                    connection.execute(statement)
            _add(connection, self._unsaved)
        self._unsaved = _Counters()

    @property
    def branches(self) -> Mapping[Branch, float]:
        """How often each option was taken, by program, site, occurrence and option."""
        return self._known.branches

    @property
    def outputs(self) -> Mapping[tuple[str, str], RunningMean]:
        """Tokens generated per call, by program and call site."""
        return self._known.outputs

    @property
    def tools(self) -> Mapping[str, Sequence[float]]:
        """The last durations of each tool in seconds, oldest first, at most 128."""
        return self._known.tools

    def learn_branch(
        self, program: str, site: str, occurrence: int, option: str, weight: float = 1.0
    ) -> None:
        """Count that an option was taken when the site had been reached `occurrence` times before."""
        assert occurrence >= 0, f"{site}: occurrence {occurrence}"
        assert 0 <= weight < math.inf, f"{site}: weight {weight}"
        for counters in (self._known, self._unsaved):
            counters.add_branch((program, site, occurrence, option), weight)

    def learn_output(self, program: str, site: str, num_tokens: int) -> None:
        """Count a generation of so many tokens."""
        assert num_tokens >= 0, f"{site}: {num_tokens} tokens"
        for counters in (self._known, self._unsaved):
            counters.add_output((program, site), RunningMean(1, num_tokens))

    def learn_tool(self, tool: str, duration_s: float) -> None:
        """Note how long a tool took."""
        assert 0 <= duration_s < math.inf, f"{tool}: {duration_s} s"
        for counters in (self._known, self._unsaved):
            counters.add_duration(tool, duration_s)

    def weights(self, program: str, site: str, occurrence: int, options: Sequence[str]) -> tuple[float, ...]:
        """Return how likely each option is when the site has been reached `occurrence` times before.

        With n_o the weight of option o at this occurrence, N their sum and k the number of options, that is
        (n_o + 1) / (N + k) (Laplace). If N = 0, n_o is the weight of o at the site over all occurrences; if
        that is 0 for all, every option has 1 / k. What was seen of other options does not count. The
        result sums to 1, unless there are no options. O(k).
        """
        here = [self._known.branches.get((program, site, occurrence, option), 0.0) for option in options]
        if not any(here):
            here = [self._known.sites.get((program, site, option), 0.0) for option in options]
        total = sum(here) + len(options)
        return tuple((seen + 1) / total for seen in here)

    def output_len(self, program: str, site: str) -> float | None:
        """Return the mean number of tokens that a call site generates, None if it never did."""
        lengths = self._known.outputs.get((program, site))
        return lengths.mean if lengths else None

    def tool_s(self, tool: str) -> float | None:
        """Return the mean of a tool's last durations in seconds, None if it never ran."""
        durations = self._known.tools.get(tool)
        return sum(durations) / len(durations) if durations else None

    def tool_quantile_s(self, tool: str, q: float) -> float | None:
        """Return the duration in seconds that a share `q` (0 to 1) of a tool's last runs stayed within.

        Between two durations it is interpolated linearly. None if the tool never ran. O(128 log 128).
        """
        assert 0 <= q <= 1, f"q={q}"
        durations = sorted(self._known.tools.get(tool, ()))
        if not durations:
            return None
        below, part = divmod(q * (len(durations) - 1), 1)
        low, high = durations[int(below)], durations[math.ceil(below + part)]
        return low + (high - low) * part


@contextmanager
def _transaction(path: Path, begin: str) -> "Iterator[sqlite3.Connection]":
    """Do all that is done to a file, or nothing of it."""
    import sqlite3

    try:
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    except sqlite3.Error as error:
        raise _explained(path, error) from error
    try:
        connection.execute(begin)
        yield connection
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise _explained(path, error) from error
    finally:
        connection.close()  # undoes what was not committed


def _explained(path: Path, error: "sqlite3.Error") -> Exception:
    """Return what to raise: the world's fault when the file may well be sound, else that of who named it."""
    import sqlite3

    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # above it stand the details
    passing = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
    if code in passing:
        return PrebleError(f"{path}: the program profile cannot be read or written now ({error})")
    return InputError(f"{path}: cannot be used as a program profile ({error}): {REMEDY}")


def _has_tables(path: Path, connection: "sqlite3.Connection") -> bool:
    """Return whether the file was begun. Raises InputError if it is another database or another version."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version == 0 and num_tables == 0:
        return False
    if version == 0:
        raise InputError(f"{path}: a database, but not a program profile: {REMEDY}")
    if version != VERSION:
        raise InputError(f"{path}: program profile of version {version}, only {VERSION} is known: {REMEDY}")
    return True


def _read(connection: "sqlite3.Connection", counters: _Counters) -> None:
    for program, site, occurrence, option, weight in connection.execute("SELECT * FROM branches"):
        counters.add_branch((program, site, occurrence, option), weight)
    for program, site, count, total in connection.execute("SELECT * FROM outputs"):
        counters.add_output((program, site), RunningMean(count, total))
    for tool, duration_s in connection.execute("SELECT tool, duration_s FROM durations ORDER BY id"):
        counters.add_duration(tool, duration_s)


def _add(connection: "sqlite3.Connection", learnt: _Counters) -> None:
    branches = [(*branch, weight) for branch, weight in learnt.branches.items()]
    outputs = [(*key, lengths.count, lengths.total) for key, lengths in learnt.outputs.items()]
    durations = [(tool, duration_s) for tool, kept in learnt.tools.items() for duration_s in kept]
    connection.executemany(ADD_BRANCH, branches)
    connection.executemany(ADD_OUTPUT, outputs)
    connection.executemany(ADD_DURATION, durations)
    connection.executemany(DROP_OLD_DURATIONS, [(tool,) for tool in learnt.tools])
