"""Questions over a document: the document once, then one branch per question.

A row: {"document": "...", "questions": ["...", "..."]}. The result: one answer per question, in order.
All branches share the instructions and the document, so those are computed once per document.
"""

import preble_sgl as ps

INSTRUCTIONS = (
    "You answer questions about a document. Use only what the document says. "
    "If it does not say, answer: not stated. Keep every answer to one sentence."
)


@ps.program
async def document_qa(s: ps.State, document: str, questions: list[str], max_tokens: int = 32) -> list[str]:
    """Answer every question from the document."""
    s += ps.system(INSTRUCTIONS)
    s += ps.user(f"The document:\n\n{document}")
    s += ps.assistant("I have read the document. What is the question?")
    return await s.map(questions, lambda branch, q: branch.ask(ps.user(q), max_tokens=max_tokens))
