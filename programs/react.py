"""A ReAct agent: it looks things up and calculates until it can answer.

A row: {"question": "...", "documents": {"title": "text", ...}}. The result: the answer.
All rows share the instructions and the descriptions of the tools; each step extends the prompt of the last.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

import preble_sgl as ps

RULES = (
    "You answer questions about a collection of documents. Look up what you need, calculate with the tool "
    "and not in your head, and answer in one sentence as soon as you can."
)
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@ps.tool(max_len=32)
def calculate(expression: str) -> float:
    """Calculate with + - * / and parentheses."""
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.expr) -> float:
    """Evaluate numbers and the four operations, and nothing else."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return float(OPERATORS[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
    raise ValueError(f"cannot calculate {ast.unparse(node)}")


@ps.program
async def react(
    s: ps.State, question: str, documents: dict[str, str], max_steps: int = 6, max_tokens: int = 96
) -> str:
    """Step until there is a final answer; after the last step, ask for one without tools."""

    @ps.tool(max_len=256)
    def look_up(title: str) -> str:
        """Return the text of the document whose title is most like this one."""
        words = set(title.lower().split())
        best = max(documents, key=lambda name: len(words & set(name.lower().split())))
        return f"{best}: {documents[best]}"

    tools: list[ps.Tool[..., Any]] = [look_up, calculate]
    s += ps.system(RULES, tools=tools) + ps.user(f"Titles: {', '.join(documents)}\n\nQuestion: {question}")
    for _ in s.loop(max=max_steps):
        turn = await s.act(tools, max_tokens=max_tokens, name="step")
        if turn.final is not None:
            return turn.final
        await s.use(turn)
    return await s.ask(ps.user("No more steps. Answer now."), max_tokens=max_tokens, name="last")
