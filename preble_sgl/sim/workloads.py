"""What is asked: five workloads in the shape of Preble's Table 1, and the lengths of two Azure services.

Seeded, endless and made of random tokens, so that only lengths and sharing are real and nothing is
downloaded. Source: Srivatsa et al., Preble, ICLR 2025 (arXiv 2407.00023), appendix A, Table 1; the
experiments' sizes are those of its published benchmark code. The table calls the deepest node of a prompt's
path that is longer than all before it together the *key portion*; it counts a prefix as shared from its
second request on, so the first request of every group shares only what groups have in common. What the table
leaves open, this file chooses so that its means and deviations come out, which a test checks.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from preble_sgl.core import TokenIds, token_ids
from preble_sgl.errors import InputError
from preble_sgl.sim.distributions import Constant, Distribution, LogNormal, Normal, Quantiles, draw_len
from preble_sgl.sim.popularity import Popularity, Ranked, Turnover

AzureService = Literal["code", "conv"]
"""The services that Azure recorded in 2023: code completion, conversation."""

# How many groups are under discussion is our choice; the numbers of requests per group are the table's.
TOOLS = Turnover(40, LogNormal(39, 64))
TOOL_INSTRUCTIONS = Normal(1460, 790, 180, 3600)
TOOL_QUESTION = LogNormal(200, 60, high=340)
TOOL_OUTPUT = LogNormal(43, 16)

ACTION = LogNormal(16, 13)
NO_PAUSE = Constant(0.0)
FULL_EPISODE = 50
TASK_TYPES = 6

PROBLEMS = Turnover(8, Constant(16))
PROBLEM = LogNormal(1420, 1656, 30)
SOLUTION = LogNormal(190, 343)

VIDEOS = Turnover(32, Normal(8.6, 2))
VIDEO = LogNormal(9840, 5976, 500)
VIDEO_OUTPUT = LogNormal(4, 1.5)

DOCUMENTS = Turnover(8, Normal(18, 8.6))
DOCUMENT = LogNormal(22_930, 6090, 1000)
DOCUMENT_QUESTION = LogNormal(500, 400, 20)
DOCUMENT_OUTPUT = LogNormal(16, 9.9)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `new` comes after the prompts and outputs of all turns before it.

    `output` is what the model will generate; `pause_s` passes between the turn before and this one.
    """

    new: TokenIds
    output: TokenIds
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Requests of which each starts when the one before is done. Sessions of one `group` share a prefix."""

    turns: tuple[Turn, ...]
    group: int

    def prompts(self) -> Iterator[TokenIds]:
        """Yield the whole prompt of each turn, provided that the outputs come as recorded."""
        before = token_ids()
        for turn in self.turns:
            prompt = before + turn.new
            yield prompt
            before = prompt + turn.output


Sessions: TypeAlias = Callable[[random.Random], Iterator[Session]]
"""Yields sessions without end; equal seeds yield equal sessions."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, without when.

    `num_turns`: mean turns of a session. `rps`: the range of requests per second per two GPUs that Preble's
    experiments sweep, None where there are none.
    """

    name: str
    sessions: Sessions
    num_turns: float = 1.0
    rps: tuple[float, float] | None = None

    def session_rate(self, request_rate: float) -> float:
        """Return the sessions per second that make `request_rate` requests per second."""
        return request_rate / self.num_turns


def toolbench(
    *,
    popularity: Popularity = TOOLS,
    output: Distribution = TOOL_OUTPUT,
) -> Workload:
    """Questions to tools: a system prompt, one tool's instructions, a question.

    Instructions are drawn from a normal distribution: the lognormal one has too few short ones to spread the
    key portion as the table has it. `popularity` is over tools.
    """

    def prefixes(rng: random.Random) -> Iterator[TokenIds]:
        return _after_system(rng, 165, TOOL_INSTRUCTIONS)

    return _questions("toolbench", (3, 18), popularity, prefixes, TOOL_QUESTION, output)


def alfworld(
    *,
    output: Distribution = ACTION,
    observation_len: int = 7,
    pause_s: Distribution = NO_PAUSE,
    demo_len: int = 0,
) -> Workload:
    """Episodes of an embodied agent: a task with a demonstration, then up to 50 actions and observations.

    A session is an episode and a group of its own. Nine in ten episodes run to the cap, the others end
    anywhere before, which gives the table's 48 ± 8 turns. The table's numbers leave no room for prefixes
    shared between episodes; `demo_len` tokens of demonstration for each of 6 types of task would add them.
    `pause_s`: what the environment takes between two turns.
    """
    start = LogNormal(1730, 345, demo_len + 1)

    def sessions(rng: random.Random) -> Iterator[Session]:
        demos = [random_tokens(rng, demo_len) for _ in range(TASK_TYPES)]
        group = 0
        while True:
            opening = rng.choice(demos) + random_tokens(rng, draw_len(start, rng) - demo_len)
            turns = [Turn(opening, random_tokens(rng, draw_len(output, rng)))]
            for _ in range(_episode_len(rng) - 1):
                observed = random_tokens(rng, observation_len)
                turns.append(Turn(observed, random_tokens(rng, draw_len(output, rng)), pause_s.draw(rng)))
            yield Session(tuple(turns), group)
            group += 1

    return Workload("alfworld", sessions, num_turns=47.9, rps=(3, 18))


def apps(
    *,
    popularity: Popularity = PROBLEMS,
    output: Distribution = SOLUTION,
) -> Workload:
    """Programming problems: a demonstration for all, a problem, and a short ending of each sample's own.

    A problem is sampled 16 times, a few problems interleaved. One problem in seven is longer than the
    demonstration, so that the key portion is shared by 16 requests or by all: 126 in the mean, as in the
    table. The deviation grows with the root of the number of requests: the table's 2157 takes 45,000.
    """

    def prefixes(rng: random.Random) -> Iterator[TokenIds]:
        return _after_system(rng, 2400, PROBLEM)

    return _questions("apps", (0.5, 6), popularity, prefixes, Constant(50), output)


def videoqa(
    *,
    popularity: Popularity = VIDEOS,
    video: Distribution = VIDEO,
    output: Distribution = VIDEO_OUTPUT,
) -> Workload:
    """Questions about videos, each the tokens of its frames.

    A question of 25 tokens makes the share of the video vary by 0.2 %, as in the table; it prints 99 % for
    the share itself, where this gives 99.6 %.
    """

    def prefixes(rng: random.Random) -> Iterator[TokenIds]:
        return _after_system(rng, 0, video)

    return _questions("videoqa", (0.5, 7), popularity, prefixes, Constant(25), output)


def loogle(
    *,
    popularity: Popularity = DOCUMENTS,
    document: Distribution = DOCUMENT,
    question: Distribution = DOCUMENT_QUESTION,
    output: Distribution = DOCUMENT_OUTPUT,
) -> Workload:
    """Questions about long documents behind a system prompt of 13 tokens.

    One document in seventeen is another edition of the one before, alike in its first 45 %: without such
    documents the key portion would hardly vary, and the table has 94 % ± 15 %.
    """

    def prefixes(rng: random.Random) -> Iterator[TokenIds]:
        return _documents(rng, 13, document, edition_rate=0.06, alike=0.45)

    return _questions("loogle", (0.1, 1.2), popularity, prefixes, question, output)


def azure_lengths(service: AzureService) -> Workload:
    """Requests that share nothing, with prompts and outputs as long as those of an Azure service in 2023."""
    prompt, output = AZURE_LENGTHS[service]

    def sessions(rng: random.Random) -> Iterator[Session]:
        group = 0
        while True:
            yield _single_turn(rng, group, random_tokens(rng, draw_len(prompt, rng)), output)
            group += 1

    return Workload(f"azure_{service}", sessions)


def experiment(
    name: str, num_gpus: int, *, zipf: float | None = None, shift_every: int | None = None
) -> Workload:
    """Return a workload at the scale of Preble's experiments on `num_gpus` GPUs.

    A fixed set of prefixes in random order: by Zipf 1.1 for ToolBench and evenly for the others, unless
    `zipf` says otherwise (the experiments ask long videos more often). ALFWorld's episodes are new each time.
    Prompts are cropped, and outputs are as long, as in the experiments. Raises InputError.
    """

    def of(per_two_gpus: int, usual: float = 0.0) -> Ranked:
        num = max(1, per_two_gpus * num_gpus // 2)
        return Ranked(num, usual if zipf is None else zipf, shift_every)

    match name:
        case "toolbench":
            return toolbench(popularity=of(200, 1.1))
        case "alfworld":
            return alfworld(output=Constant(26), observation_len=14)
        case "apps":
            return apps(popularity=of(130), output=replace(SOLUTION, high=512))
        case "videoqa":
            return videoqa(popularity=of(150), video=replace(VIDEO, high=8192 - 25))
        case "loogle":
            return loogle(
                popularity=of(27),
                document=replace(DOCUMENT, high=32_768 - 45 - 13 - 300),
                question=LogNormal(100, 40, 20, 300),
                output=Constant(45),
            )
        case _:
            raise InputError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")


AZURE_LENGTHS: Mapping[AzureService, tuple[Quantiles, Quantiles]] = {
    "code": (
        Quantiles({0: 3, 0.1: 147, 0.5: 1469, 0.9: 5188, 0.99: 7436, 1: 7437}),
        Quantiles({0: 1, 0.1: 7, 0.5: 13, 0.75: 18, 0.9: 55, 0.99: 251, 1: 1000}),
    ),
    "conv": (
        Quantiles({0: 2, 0.1: 207, 0.5: 1020, 0.75: 1200, 0.9: 2735, 0.99: 4142, 1: 14_050}),
        Quantiles({0: 1, 0.1: 54, 0.5: 129, 0.75: 390, 0.9: 424, 0.99: 601, 1: 1000}),
    ),
}
"""Tokens of prompts and of outputs in the Azure LLM inference traces of 2023.

The quantiles 0.1, 0.5, 0.9 and 0.99 are recorded; the ends and 0.75 are chosen so that the recorded means
come out.
"""


def random_tokens(rng: random.Random, num: int) -> TokenIds:
    """Return `num` tokens below 65,536."""
    packed = bytearray(4 * num)
    packed[0::4] = rng.randbytes(num)
    packed[1::4] = rng.randbytes(num)
    ids = token_ids()
    ids.frombytes(packed)
    return ids


def _questions(
    name: str,
    rps: tuple[float, float],
    popularity: Popularity,
    prefixes: Callable[[random.Random], Iterator[TokenIds]],
    question: Distribution,
    output: Distribution,
) -> Workload:
    """Return the workload that draws a group for each session and asks one question after its prefix."""

    def sessions(rng: random.Random) -> Iterator[Session]:
        for group, prefix in popularity.draw(rng, prefixes(rng)):
            yield _single_turn(rng, group, prefix + random_tokens(rng, draw_len(question, rng)), output)

    return Workload(name, sessions, rps=rps)


def _single_turn(rng: random.Random, group: int, prompt: TokenIds, output: Distribution) -> Session:
    return Session((Turn(prompt, random_tokens(rng, draw_len(output, rng))),), group)


def _after_system(rng: random.Random, system_len: int, length: Distribution) -> Iterator[TokenIds]:
    """Yield prefixes that begin with one system prompt and go on each on its own."""
    system = random_tokens(rng, system_len)
    while True:
        yield system + random_tokens(rng, draw_len(length, rng))


def _documents(
    rng: random.Random, system_len: int, length: Distribution, *, edition_rate: float, alike: float
) -> Iterator[TokenIds]:
    """Yield documents after a system prompt; some begin as the document before does, for `alike` of it."""
    system = random_tokens(rng, system_len)
    document = token_ids()
    while True:
        same = document[: int(alike * len(document))] if rng.random() < edition_rate else token_ids()
        document = same + random_tokens(rng, max(1, draw_len(length, rng) - len(same)))
        yield system + document


def _episode_len(rng: random.Random) -> int:
    return FULL_EPISODE if rng.random() < 0.91 else rng.randint(5, FULL_EPISODE - 1)


WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload for workload in (toolbench(), alfworld(), apps(), videoqa(), loogle())
}
"""The workloads of Table 1, by name."""
