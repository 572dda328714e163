"""The programs that studies run: seeded scripts of random tokens, so that only lengths and sharing are real.

    judge        a rubric, a document of some thousand tokens, a question per dimension at once, a verdict
    questions    the same calls in random order, each a program of its own
    hot_judge    hundreds of short cases about ten documents
    tree         tree of thought: three thoughts, each with three, each with three; scored on the way back
    agents       a conversation with a tool: action, pause, observation, 10 to 30 times
    tenants      tool calls, long documents and agents of three tenants at the same time

Batches are all there at the start; `spread` gives scripts Poisson arrivals instead.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

from benchmarks.program_shapes.script import Fork, Gen, Pause, Say, Script, Step, Steps, of_session
from preble_sgl.core import TokenIds
from preble_sgl.sim.distributions import Distribution, LogNormal, draw_len
from preble_sgl.sim.workloads import Workload, random_tokens

RUBRIC_LEN = 600
DOCUMENT = LogNormal(6000, 2500, 1500, 16_000)
DIMENSION_LEN = 40
NOTE = LogNormal(120, 60, 16, 256)
NOTE_LIMIT = 256
CASE = LogNormal(400, 200, 50, 1500)

THOUGHT = LogNormal(200, 80, 40, 400)
THOUGHT_LIMIT = 400
SCORE = LogNormal(40, 15, 8, 64)
SCORE_LIMIT = 64
PROBLEM = LogNormal(3000, 1500, 500, 8000)

TOOL_DOCS_LEN = 1500
TASK = LogNormal(400, 200, 50, 1500)
ACTION = LogNormal(90, 50, 16, 256)
ACTION_LIMIT = 256
OBSERVATION = LogNormal(300, 150, 100, 500)
TOOL_S = LogNormal(4.0, 4.0, 0.2, 60.0)

ANSWER_LIMIT = 128
"""What calls of other workloads are allowed to generate."""


def judge(rng: random.Random, num_tokens: int, dimensions: int = 6) -> list[Script]:
    """Return a judge per document, of documents with `num_tokens` tokens together."""
    rubric, asked = (
        random_tokens(rng, RUBRIC_LEN),
        [random_tokens(rng, DIMENSION_LEN) for _ in range(dimensions)],
    )
    return [
        Script("judge", _judge(rng, rubric + document, asked)) for document in _documents(rng, num_tokens)
    ]


def questions(rng: random.Random, num_tokens: int, dimensions: int = 6) -> list[Script]:
    """Return a program per document and dimension, in random order."""
    rubric, asked = (
        random_tokens(rng, RUBRIC_LEN),
        [random_tokens(rng, DIMENSION_LEN) for _ in range(dimensions)],
    )
    pairs = [(rubric + document, ask) for document in _documents(rng, num_tokens) for ask in asked]
    rng.shuffle(pairs)
    return [Script("question", (Say(head + ask), _gen(rng, NOTE, NOTE_LIMIT))) for head, ask in pairs]


def hot_judge(rng: random.Random, num: int, *, num_documents: int = 10, dimensions: int = 4) -> list[Script]:
    """Return `num` judges of cases, each about one of a few documents."""
    documents = [random_tokens(rng, RUBRIC_LEN + draw_len(DOCUMENT, rng)) for _ in range(num_documents)]
    asked = [random_tokens(rng, DIMENSION_LEN) for _ in range(dimensions)]
    heads = [rng.choice(documents) + random_tokens(rng, draw_len(CASE, rng)) for _ in range(num)]
    return [Script("case", _judge(rng, head, asked)) for head in heads]


def tree(rng: random.Random, num: int, *, width: int = 3, depth: int = 3) -> list[Script]:
    """Return `num` trees of thought about problems of their own."""
    header = random_tokens(rng, RUBRIC_LEN)
    problems = [header + random_tokens(rng, draw_len(PROBLEM, rng)) for _ in range(num)]
    return [Script("tree", (Say(problem), *_thoughts(rng, width, depth))) for problem in problems]


def agents(
    rng: random.Random, num: int, *, num_steps: tuple[int, int] = (10, 30), pause_s: Distribution = TOOL_S
) -> list[Script]:
    """Return `num` agents with one set of tools, each with a task of its own."""
    tool_docs = random_tokens(rng, TOOL_DOCS_LEN)
    return [Script("agent", _agent(rng, tool_docs, rng.randint(*num_steps), pause_s)) for _ in range(num)]


def tenants(
    rng: random.Random,
    workloads: Sequence[tuple[Workload, int]],
    num_agents: int,
    *,
    num_steps: tuple[int, int] = (10, 30),
) -> list[Script]:
    """Return sessions of each workload and agents; each kind is a tenant's and comes evenly mixed."""
    kinds = [sessions(rng, workload, num, tenant=workload.name) for workload, num in workloads]
    kinds.append([replace(one, tenant="agents") for one in agents(rng, num_agents, num_steps=num_steps)])
    return _interleave(rng, kinds)


def sessions(rng: random.Random, workload: Workload, num: int, *, tenant: str = "default") -> list[Script]:
    """Return the first `num` sessions of a workload."""
    found = islice(workload.sessions(rng), num)
    return [of_session(one, workload.name, at=0.0, limit=ANSWER_LIMIT, tenant=tenant) for one in found]


def spread(rng: random.Random, scripts: Sequence[Script], span_s: float) -> list[Script]:
    """Let scripts arrive in their order during `span_s`, as a Poisson process does that brings so many."""
    instants = sorted(rng.uniform(0, span_s) for _ in scripts)
    return [replace(script, at=at) for script, at in zip(scripts, instants, strict=True)]


def _interleave(rng: random.Random, kinds: Sequence[Sequence[Script]]) -> list[Script]:
    """Return the scripts of all kinds in random order, but those of one kind in theirs."""
    order = [i for i, kind in enumerate(kinds) for _ in kind]
    rng.shuffle(order)
    rest = [iter(kind) for kind in kinds]
    return [next(rest[i]) for i in order]


def _documents(rng: random.Random, num_tokens: int) -> list[TokenIds]:
    found: list[TokenIds] = []
    while sum(map(len, found)) < num_tokens:
        found.append(random_tokens(rng, draw_len(DOCUMENT, rng)))
    return found


def _judge(rng: random.Random, head: TokenIds, asked: Sequence[TokenIds]) -> Steps:
    """A question per dimension at once, then a verdict that reads all notes."""
    notes = [_gen(rng, NOTE, NOTE_LIMIT) for _ in asked]
    read = random_tokens(rng, DIMENSION_LEN + sum(len(note.output) for note in notes))
    branches = tuple((Say(ask), note) for ask, note in zip(asked, notes, strict=True))
    return (Say(head), Fork(branches), Say(read), _gen(rng, NOTE, NOTE_LIMIT))


def _thoughts(rng: random.Random, width: int, depth: int) -> Steps:
    """Branches of one thought each, which go on in the same way; then one score that has read them."""
    if not depth:
        return ()
    branches = tuple(
        (Say(random_tokens(rng, 20)), _gen(rng, THOUGHT, THOUGHT_LIMIT), *_thoughts(rng, width, depth - 1))
        for _ in range(width)
    )
    return (Fork(branches), Say(random_tokens(rng, width * 60)), _gen(rng, SCORE, SCORE_LIMIT))


def _agent(rng: random.Random, tool_docs: TokenIds, num_steps: int, pause_s: Distribution) -> Steps:
    steps: list[Step] = [
        Say(tool_docs + random_tokens(rng, draw_len(TASK, rng))),
        _gen(rng, ACTION, ACTION_LIMIT),
    ]
    for _ in range(num_steps - 1):
        steps.append(Pause(pause_s.draw(rng), TOOL_S.mean))
        steps += [Say(random_tokens(rng, draw_len(OBSERVATION, rng))), _gen(rng, ACTION, ACTION_LIMIT)]
    return tuple(steps)


def _gen(rng: random.Random, length: Distribution, limit: int) -> Gen:
    return Gen(random_tokens(rng, draw_len(length, rng)), limit)
