"""Time jumps from event to event, in order, and not backwards."""

import pytest

from preble_sgl.sim.virtual_time import VirtualTime


def test_things_happen_at_their_instants_whatever_the_order_they_were_made_in() -> None:
    clock = VirtualTime()
    happened: list[tuple[float, str]] = []
    for when, name in [(3.0, "c"), (1.0, "a"), (2.5, "b")]:
        clock.call_at(when, lambda name=name: happened.append((clock.time(), name)))
    assert clock.time() == 0.0
    clock.run()
    assert happened == [(1.0, "a"), (2.5, "b"), (3.0, "c")]
    assert clock.time() == 3.0


def test_events_of_one_instant_happen_in_the_order_they_were_made() -> None:
    clock = VirtualTime()
    happened: list[int] = []
    for number in range(100):
        clock.call_at(1.0, happened.append, number)
    clock.run()
    assert happened == list(range(100))


def test_what_happens_may_make_more_happen_even_in_the_same_instant() -> None:
    clock = VirtualTime()
    happened: list[tuple[float, str]] = []

    def note(name: str) -> None:
        happened.append((clock.time(), name))
        if name == "first":
            clock.call_at(clock.time(), note, "made by first")
            clock.call_at(clock.time() + 1, note, "later")

    clock.call_at(1.0, note, "first")
    clock.call_at(1.0, note, "second")
    clock.run()
    assert happened == [(1.0, "first"), (1.0, "second"), (1.0, "made by first"), (2.0, "later")]


def test_what_is_cancelled_does_not_happen() -> None:
    clock = VirtualTime()
    happened: list[str] = []
    timer = clock.call_at(2.0, happened.append, "cancelled")
    clock.call_at(1.0, timer.cancel)
    clock.call_at(3.0, happened.append, "kept")
    timer.cancel()
    clock.run()
    assert happened == ["kept"]
    timer.cancel()


def test_time_does_not_run_backwards() -> None:
    clock = VirtualTime()
    clock.call_at(5.0, lambda: None)
    clock.run()
    with pytest.raises(AssertionError, match="backwards"):
        clock.call_at(4.9, lambda: None)


def test_it_can_run_again_from_where_it_stopped() -> None:
    clock = VirtualTime()
    clock.run()
    clock.call_at(1.0, lambda: None)
    clock.run()
    happened: list[float] = []
    clock.call_at(1.5, lambda: happened.append(clock.time()))
    clock.run()
    assert happened == [1.5]
