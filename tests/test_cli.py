"""The command line: bad input is one line and exit status 2, and leaves nothing behind."""

import socket
import sys
from pathlib import Path

import orjson
import pytest

from preble_sgl import cli
from preble_sgl.runtime_ext import launch_spec
from preble_sgl.runtime_ext.environment import Missing

QA = "programs/document_qa.py"
ROW = b'{"document": "d", "questions": ["q"]}\n'


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["preble-sgl", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW)
    return path


@pytest.fixture
def taken_port():  # type: ignore[no-untyped-def]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + b"not json\n", "rows.jsonl:2: not JSON"),
        (ROW + b"\n[1]\n", "rows.jsonl:3: not a JSON object of arguments, but list"),
        (
            b'{"document": "d"}\n',
            "row 0: missing a required argument: 'questions'; document_qa(document: str",
        ),
        (b"\n", "rows.jsonl has no rows"),
    ],
)
def test_bad_rows_are_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    content: bytes,
    message: str,
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_bytes(content)
    assert run(monkeypatch, "run", QA, "--rows", rows, "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtimes", "0"], "0 runtimes asked for: at least 1 is needed"),
        (["--model-path", "/no/such/model"], "/no/such/model"),
        (["--policy", "best"], "best"),
        (["--concurrency", "0"], "--concurrency 0: at least 1"),
        (["--attempts", "0"], "--attempts 0: at least 1"),
        (["--reorder", "columns"], "--reorder columns: rows or fields"),
        (["--attach", "http://127.0.0.1:9", "--runtimes", "2"], "leave out --runtimes"),
        (["--attach", "http://127.0.0.1:9"], "no runtime answers at http://127.0.0.1:9"),
        (["--attach", "nonsense"], "'nonsense' is not the URL of a runtime"),
    ],
)
def test_bad_options_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    rows: Path,
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "run", QA, "--rows", rows, "--out", tmp_path / "out.jsonl", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [rows]


def test_a_port_in_use_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tiny_model: Path,
    rows: Path,
    taken_port: int,
) -> None:
    out = tmp_path / "out.jsonl"
    options = ["--model-path", tiny_model, "--port", taken_port, "--runtimes", "1"]
    assert run(monkeypatch, "run", QA, "--rows", rows, "--out", out, *options) == 2
    assert f"port {taken_port} is in use" in capsys.readouterr().err
    assert not out.exists()


def test_a_program_file_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: Path
) -> None:
    broken, several = tmp_path / "broken.py", tmp_path / "several.py"
    broken.write_text("import no_such_module_here\n")
    several.write_text(
        "import preble_sgl as ps\n@ps.program\nasync def a(s): ...\n@ps.program\nasync def b(s): ...\n"
    )
    for program, message in [
        (tmp_path / "none.py", "none.py does not exist"),
        (broken, "cannot be imported: ModuleNotFoundError"),
        (several, "has 2 programs (a, b): name one as"),
        (f"{several}:c", "has no program c; it has: a, b"),
    ]:
        assert run(monkeypatch, "explain", program, "--rows", rows) == 2
        assert message in capsys.readouterr().err


def test_explain_prints_the_plan_without_any_runtime(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path, rows: Path
) -> None:
    rows.write_bytes(orjson.dumps({"document": "word " * 300, "questions": ["a?", "b?", "c?"]}))
    assert run(monkeypatch, "explain", QA, "--rows", rows, "--model-path", tiny_model, "--runtimes", "2") == 0
    text = capsys.readouterr().out
    assert "document_qa · 1 rows · 3 calls" in text
    assert "on 2 runtimes of 65,536 KV tokens: preble_e2 keeps" in text
    assert "calls: cpu0 3" in text


def test_explain_writes_a_page_and_a_call_graph(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, rows: Path
) -> None:
    rows.write_bytes(orjson.dumps({"document": "word", "questions": ["a?"]}))
    page, graph = tmp_path / "plan.html", tmp_path / "plan.mmd"
    files = ("--html", page, "--mermaid", graph)
    assert run(monkeypatch, "explain", QA, "--rows", rows, "--model-path", tiny_model, *files) == 0
    assert "document_qa" in page.read_text()
    assert graph.read_text().startswith("flowchart TD")


def test_what_is_not_installed_is_one_line_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: Path
) -> None:
    missing = tuple(Missing(name, name, None, "pip install 'preble-sgl[cpu]'") for name in "abcde")
    monkeypatch.setattr(launch_spec, "missing_requirements", lambda gpu: missing)
    assert run(monkeypatch, "run", QA, "--rows", rows, "--out", tmp_path / "out.jsonl") == 2
    problems = "; ".join(f"{name} is not installed (needed: {name})" for name in "abc")
    remedy = "pip install 'preble-sgl[cpu]'"
    assert capsys.readouterr().err == f"preble-sgl: {problems} and 2 more; run: {remedy}\n"


def test_make_model_writes_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(monkeypatch, "make-model", tmp_path / "m") == 0
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {
        p.name for p in (tmp_path / "m").iterdir()
    }
