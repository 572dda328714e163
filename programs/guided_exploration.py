"""Language-guided exploration: an agent learns to cross a grid, and another learns when to ask the model.

A row: {"size": 5, "walls": [[1, 1]], "goal": [4, 4], "starts": [[0, 0], [0, 4]], "episodes": 12, "seed": 0}.
The result: a `Learnt`. After LaGR-SEQ, "Language-Guided Reinforcement Learning with Sample-Efficient
Querying" (arXiv 2308.13542), made small: a primary agent learns by Q-learning; the model extrapolates from
where an episode starts to the goal; a secondary agent, rewarded when that was right and charged for each
query, learns from which starts asking is worth it. All queries share the rules, those of a row its grid.
"""

import random
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

import preble_sgl as ps

MOVES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
RULES = "You plan ways through grids. Answer with moves only: up, down, left, right, separated by spaces."
LEARN_RATE, DISCOUNT, CURIOSITY, QUERY_COST, MOST_STEPS = 0.5, 0.95, 0.1, 0.3, 60

Cell = tuple[int, int]


@dataclass
class Learnt:
    """Steps of each episode, how often the model was asked, and how often that helped."""

    steps: list[int]
    queries: int
    useful: int


@dataclass
class Explorer:
    """The primary agent and its world."""

    size: int
    walls: set[Cell]
    goal: Cell
    rng: random.Random
    values: dict[tuple[Cell, str], float] = field(default_factory=lambda: defaultdict(float))

    def after(self, cell: Cell, move: str) -> Cell:
        """Return the next cell; walls and edges hold the agent where it is."""
        x, y = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        inside = 0 <= x < self.size and 0 <= y < self.size and (x, y) not in self.walls
        return (x, y) if inside else cell

    def learn(self, cell: Cell, move: str) -> Cell:
        """Make one move and update its value; return where it leads."""
        there = self.after(cell, move)
        reward = 1.0 if there == self.goal else -0.01
        best = 0.0 if there == self.goal else max(self.values[there, m] for m in MOVES)
        self.values[cell, move] += LEARN_RATE * (reward + DISCOUNT * best - self.values[cell, move])
        return there

    def episode(self, cell: Cell) -> int:
        """Walk until the goal is reached or patience ends; return the number of steps."""
        for step in range(1, MOST_STEPS + 1):
            greedy = max(MOVES, key=lambda m: (self.values[cell, m], self.rng.random()))
            move = self.rng.choice(list(MOVES)) if self.rng.random() < CURIOSITY else greedy
            if (cell := self.learn(cell, move)) == self.goal:
                return step
        return MOST_STEPS

    def follow(self, start: Cell, text: str) -> bool:
        """Learn from a proposed way if it leads to the goal; return whether it does."""
        way, cell = [], start
        for move in (word for word in text.lower().split() if word in MOVES):
            way.append((cell, move))
            cell = self.after(cell, move)
        for step in reversed(way) if cell == self.goal else ():
            self.learn(*step)
        return cell == self.goal


@ps.program
async def guided_exploration(
    s: ps.State,
    size: int,
    walls: list[Cell],
    goal: Cell,
    starts: list[Cell],
    episodes: int = 12,
    seed: int = 0,
    max_tokens: int = 48,
) -> Learnt:
    """Run the episodes; before each, ask the model if that has been worth it from this start."""
    world = Explorer(size, {(x, y) for x, y in walls}, (goal[0], goal[1]), random.Random(seed))
    s += ps.system(RULES) + ps.user(f"A {size}x{size} grid, walls at {walls}, goal {goal}; down adds to y.")
    s += ps.assistant("From where?")
    worth: dict[Cell, float] = defaultdict(lambda: 1.0)  # hopeful at first
    steps, queries, useful = [], 0, 0
    for episode in range(episodes):
        start = (starts[episode % len(starts)][0], starts[episode % len(starts)][1])
        if worth[start] > 0:
            (branch,) = s.fork(1, name=f"query{episode}.")
            text = await branch.ask(ps.user(f"From {start}."), max_tokens=max_tokens)
            helped = ps.parse.outcome(partial(world.follow, start), text, (False, True))
            branch.done()
            queries, useful = queries + 1, useful + helped
            worth[start] += LEARN_RATE * ((1.0 if helped else -1.0) - QUERY_COST - worth[start])
        steps.append(world.episode(start))
    return Learnt(steps, queries, useful)
