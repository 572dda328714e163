"""sticky: calls return to where their session or their document was served, while that worker has room.

Two things have a home, the worker that served them last:

- the *session*: the program run of the call (`program_id`);
- the *document* (or tool, or few-shot header): the key portion of the prompt, which is the deepest part that
  is longer than all in front of it (Preble, section 3), if it was asked for before. One that was asked for
  only once has its home where most of it is cached.

Where both have one, the home with more of the prompt cached is taken, the session's on a tie: the turns of a
chat stay together, and a run over many documents follows each of them. A call without a home goes to the
worker with the fewest unfinished requests.

A home is *overloaded* when it has MIN_QUEUE unfinished requests and its share by bounded load
(`bounded_load.py`, factor LOAD_FACTOR). Its calls then overflow to the worker that is not overloaded and has
most of the prompt, the fewest requests deciding between equals, and that becomes the home. So a hot document
spreads over as many workers as it needs, and returns to those that had it before.

Source: none in particular: it is what deployments do with session cookies and routing keys
(sgl-model-gateway, `policies/manual.rs`), with the bound of Mirrokni et al., arXiv 1608.01350.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import attrgetter

from preble_sgl.core import Request, WorkerId
from preble_sgl.global_sched.node import Match
from preble_sgl.global_sched.policies.bounded_load import max_requests
from preble_sgl.global_sched.policies.protocol import Decision, FleetView, WorkerView

LOAD_FACTOR = 1.5
"""How many times the average queue a home may have; Preble's threshold for a heavy worker."""

MIN_QUEUE = 8
"""Requests that a home may always have: so small a batch costs less than computing a prefix again."""

MAX_HOMES = 65_536
"""Homes remembered, the least recently used forgotten first: about 10 MB."""


@dataclass(frozen=True, slots=True)
class Document:
    """The key portion of a prompt: a digest of the prompt up to its end, and the tokens in front of it."""

    key: bytes
    start_len: int


class Sticky:
    """Remembers the homes. Ties go to the first id."""

    name = "sticky"

    def __init__(self, *, max_homes: int = MAX_HOMES) -> None:
        self._max_homes = max_homes
        self._homes: OrderedDict[bytes, WorkerId] = OrderedDict()

    def choose(self, request: Request, match: Match, fleet: FleetView) -> Decision:
        """Pick the home, or make one. O(prompt + path + workers). Costs are unfinished requests."""
        session = b"session" + request.program_id.encode()
        document = _document(request, match)
        homes = [self._home(session, fleet)]
        if document is not None:
            homes.append(self._home(document.key, fleet) or _holder(document, match, fleet))
        decision = _decide([home for home in homes if home is not None], match, fleet)
        self._settle([session] if document is None else [session, document.key], decision.worker_id)
        return decision

    def _home(self, key: bytes, fleet: FleetView) -> WorkerView | None:
        """Return the home of a key if it is known and takes new requests."""
        home = self._homes.get(key)
        return next((worker for worker in fleet.workers if worker.worker_id == home), None)

    def _settle(self, keys: Iterable[bytes], home: WorkerId) -> None:
        for key in keys:
            self._homes[key] = home
            self._homes.move_to_end(key)
        while len(self._homes) > self._max_homes:
            self._homes.popitem(last=False)


def _decide(homes: Sequence[WorkerView], match: Match, fleet: FleetView) -> Decision:
    costs = {worker.worker_id: float(worker.num_bound) for worker in fleet.workers}
    if not homes:
        return Decision(min(fleet.workers, key=attrgetter("num_bound")).worker_id, "least_load", costs)
    home = max(homes, key=lambda worker: match.len_on(worker.worker_id))
    limit = max(MIN_QUEUE, max_requests(fleet.workers, LOAD_FACTOR))
    if home.num_bound < limit:
        return Decision(home.worker_id, "affinity", costs)
    with_room = [worker for worker in fleet.workers if worker.num_bound < limit]
    target = max(with_room, key=lambda worker: (match.len_on(worker.worker_id), -worker.num_bound))
    return Decision(target.worker_id, "overflow", costs)


def _document(request: Request, match: Match) -> Document | None:
    """Return the key portion of a prompt; None if that is the part nobody has asked for. O(prompt + path)."""
    if len(request.prompt) > 2 * match.known_len:
        return None
    for node in reversed(match.path):
        end_len = min(node.end_len, match.known_len)
        if end_len > 2 * node.start_len:
            return Document(_digest(request, end_len), node.start_len)
    return None


def _digest(request: Request, end_len: int) -> bytes:
    prefix = request.namespace.encode() + b"\0" + request.prompt[:end_len].tobytes()
    return b"document" + blake2b(prefix, digest_size=16).digest()


def _holder(document: Document, match: Match, fleet: FleetView) -> WorkerView | None:
    """Return the worker with the longest match, if that reaches into the document."""
    best = max(fleet.workers, key=lambda worker: match.len_on(worker.worker_id))
    return best if match.len_on(best.worker_id) > document.start_len else None
