"""A coding agent: a long session over a small repository until its checks pass.

A row: {"repository": {"path": "text", ...}, "task": "...", "checks": {"path": "text that must be in it"}}.
The result: a `Change`. Prompts are layered, widest shared first: instructions and tools (all rows), the
repository (rows of one repository), the task (one row), then the history of the session.
"""

import ast
from dataclasses import dataclass
from typing import Any

import preble_sgl as ps

RULES = (
    "You change code. Read before you write, change as little as you can, and run the checks after every "
    "change. When they pass, end with one sentence on what you did."
)


@dataclass
class Change:
    """What a session came to."""

    files: dict[str, str]
    passed: bool
    steps: int
    summary: str


def problems(files: dict[str, str], checks: dict[str, str]) -> list[str]:
    """Return what is wrong: files that are no Python, and texts that are not where they must be."""
    found = []
    for path, text in files.items():
        try:
            ast.parse(text)
        except SyntaxError as error:
            found.append(f"{path}:{error.lineno}: {error.msg}")
    missing = [path for path, text in checks.items() if text not in files.get(path, "")]
    return found + [f"{path}: {checks[path]!r} is missing" for path in missing]


@ps.program
async def coding_agent(
    s: ps.State,
    repository: dict[str, str],
    task: str,
    checks: dict[str, str],
    max_steps: int = 8,
    max_tokens: int = 256,
) -> Change:
    """Let the model call tools until it ends by itself or the steps are used up."""
    files = dict(repository)

    @ps.tool(max_len=512)
    def read_file(path: str) -> str:
        """Return a file of the repository."""
        return files[path]

    @ps.tool(max_len=16)
    def write_file(path: str, text: str) -> str:
        """Replace a file of the repository, or add one."""
        files[path] = text
        return "written"

    @ps.tool(max_len=128)
    def run_checks() -> str:
        """Say what is wrong with the repository as it is now."""
        return "\n".join(problems(files, checks)) or "all checks pass"

    tools: list[ps.Tool[..., Any]] = [read_file, write_file, run_checks]
    listing = "\n\n".join(f"# {path}\n{text}" for path, text in sorted(repository.items()))
    s += ps.system(RULES, tools=tools) + ps.user(f"The repository:\n\n{listing}")
    s += ps.assistant("I have read it.") + ps.user(f"The task: {task}")
    summary, steps = "the steps were used up", 0
    for _ in s.loop(max=max_steps):
        turn = await s.act(tools, max_tokens=max_tokens, name="step")
        steps += 1
        if turn.final is not None:
            summary = turn.final
            break
        await s.use(turn)
    return Change(files, not problems(files, checks), steps, summary)
