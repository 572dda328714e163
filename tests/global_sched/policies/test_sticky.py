"""Sessions and documents have homes; a home that is overloaded is left."""

from dataclasses import replace

from preble_sgl.core import ProgramId, Request
from preble_sgl.global_sched.policies.sticky import Sticky
from tests.global_sched.policies.fleets import Fleet
from tests.global_sched.stories import request


def call(text: str, *, session: str = "", namespace: str = "") -> Request:
    """Return a call of a session; without a name it has one of its own."""
    name = session or f"session of {text}"
    return replace(request("r", text, namespace=namespace), program_id=ProgramId(name))


def decide(fleet: Fleet, policy: Sticky, asked: Request) -> tuple[str, str]:
    decision = fleet.choose(policy, asked)
    return decision.worker_id, decision.reason


def test_a_session_stays_where_it_began() -> None:
    fleet, policy = Fleet([1, 0, 1]), Sticky()
    assert decide(fleet, policy, call("a:100", session="s")) == ("w1", "least_load")
    fleet.workers["w1"].num_bound = 7
    assert decide(fleet, policy, call("b:100", session="s")) == ("w1", "affinity")
    assert decide(fleet, policy, call("b:100", session="t")) == ("w0", "least_load")


def test_a_document_asked_for_once_has_its_home_where_it_is_cached() -> None:
    fleet, policy = Fleet([0, 5]), Sticky()
    fleet.cache("w1", "document:1000 question:50")
    assert decide(fleet, policy, call("document:1000 other:50")) == ("w1", "affinity")


def test_the_parts_behind_a_short_header_are_the_documents() -> None:
    fleet, policy = Fleet([0, 5]), Sticky()
    fleet.cache("w1", "header:100 document:1000 question:50")
    fleet.cache("w1", "header:100 other:1000")
    assert decide(fleet, policy, call("header:100 document:1000 a:50")) == ("w1", "affinity")
    assert decide(fleet, policy, call("header:100 new:1000")) == ("w0", "least_load")


def test_a_session_over_many_documents_follows_each_of_them() -> None:
    fleet, policy = Fleet([0, 5]), Sticky()
    assert decide(fleet, policy, call("first:100", session="s")) == ("w0", "least_load")
    fleet.cache("w1", "document:1000")
    assert decide(fleet, policy, call("document:1000 a:50", session="s")) == ("w1", "affinity")


def test_where_session_and_document_are_equally_good_the_session_stays() -> None:
    fleet, policy = Fleet([0, 0, 0]), Sticky()
    fleet.cache("w1", "document:1000")
    assert decide(fleet, policy, call("document:1000 a:50", session="s")) == ("w1", "affinity")
    fleet.cache("w2", "document:1000")
    fleet.open_ids.remove("w1")
    assert decide(fleet, policy, call("document:1000 b:50", session="t")) == ("w2", "affinity")
    fleet.open_ids.append("w1")
    assert decide(fleet, policy, call("document:1000 c:50", session="t")) == ("w2", "affinity")
    fleet.workers["w2"].num_bound = 9
    assert decide(fleet, policy, call("document:1000 d:50", session="t")) == ("w1", "overflow")
    fleet.workers["w2"].num_bound = 0
    assert decide(fleet, policy, call("document:1000 e:50", session="u")) == ("w1", "affinity")


def test_a_home_may_have_8_requests_or_half_more_than_the_average() -> None:
    for queues, reason in [
        ([7, 0], "affinity"),
        ([8, 0], "overflow"),  # ceil(1.5 * 9 / 2) = 7, but 8 are allowed
        ([14, 4], "affinity"),  # ceil(1.5 * 19 / 2) = 15
        ([15, 4], "overflow"),
    ]:
        fleet = Fleet(queues)
        fleet.cache("w0", "document:1000")
        assert decide(fleet, Sticky(), call("document:1000 a:50"))[1] == reason


def test_an_overloaded_home_is_left_for_the_worker_with_most_of_the_prompt() -> None:
    fleet, policy = Fleet([20, 3, 1]), Sticky()
    fleet.cache("w0", "document:1000")
    assert decide(fleet, policy, call("document:1000 a:50")) == ("w2", "overflow")
    fleet.cache("w1", "document:1000")
    assert decide(fleet, Sticky(), call("document:1000 a:50")) == ("w1", "overflow")


def test_the_worker_it_was_left_for_is_the_new_home() -> None:
    fleet, policy = Fleet([20, 3, 1]), Sticky()
    fleet.cache("w0", "document:1000")
    assert decide(fleet, policy, call("document:1000 a:50")) == ("w2", "overflow")
    fleet.workers["w0"].num_bound = 0
    assert decide(fleet, policy, call("document:1000 b:50")) == ("w2", "affinity")


def test_a_home_that_drains_is_replaced() -> None:
    fleet, policy = Fleet([0, 1, 2]), Sticky()
    assert decide(fleet, policy, call("a:100", session="s")) == ("w0", "least_load")
    fleet.open_ids.remove("w0")
    assert decide(fleet, policy, call("a:100", session="s")) == ("w1", "least_load")
    fleet.open_ids.append("w0")
    assert decide(fleet, policy, call("a:100", session="s")) == ("w1", "affinity")


def test_the_same_text_in_another_namespace_is_another_document() -> None:
    fleet, policy = Fleet([0, 0]), Sticky()
    fleet.cache("w1", "document:1000", namespace="tenant")
    assert decide(fleet, policy, call("document:1000 a:50", namespace="tenant")) == ("w1", "affinity")
    fleet.cache("w0", "document:1000")
    assert decide(fleet, policy, call("document:1000 b:50")) == ("w0", "affinity")


def test_the_homes_used_least_recently_are_forgotten() -> None:
    fleet, policy = Fleet([0, 1]), Sticky(max_homes=2)
    for name in ("old", "used", "old", "new"):
        decide(fleet, policy, call(f"{name}:10", session=name))
    fleet.workers["w0"].num_bound = 5
    reasons = {name: decide(fleet, policy, call("x:10", session=name))[1] for name in ("old", "new", "used")}
    assert reasons == {"old": "affinity", "new": "affinity", "used": "least_load"}
