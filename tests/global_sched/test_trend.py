"""The queueing trend of a prefix: two halves of the window compared."""

from preble_sgl.global_sched.trend import QueueingTrend


def trend(*samples: tuple[float, float]) -> QueueingTrend:
    """Samples as (queueing time, instant), in a window of 20 seconds."""
    it = QueueingTrend(window_s=20.0)
    for queueing_s, now in samples:
        it.add(queueing_s, now)
    return it


def test_a_doubled_average_is_reported() -> None:
    assert trend((1.0, 1.0), (3.0, 2.0), (4.0, 11.0)).doubled_to(12.0, min_samples=1) == 4.0


def test_less_than_double_is_not() -> None:
    assert trend((1.0, 1.0), (3.0, 2.0), (3.9, 11.0)).doubled_to(12.0, min_samples=1) is None


def test_too_few_samples_say_nothing() -> None:
    assert trend((1.0, 1.0), (9.0, 11.0), (9.0, 12.0)).doubled_to(12.0, min_samples=2) is None


def test_an_old_rise_says_nothing_about_now() -> None:
    assert trend((1.0, 1.0), (9.0, 11.0)).doubled_to(20.0, min_samples=1) is None


def test_a_silent_half_breaks_the_comparison() -> None:
    assert trend((1.0, 1.0), (9.0, 21.0)).doubled_to(22.0, min_samples=1) is None
