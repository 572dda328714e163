"""The programs of the simulation studies: they run to their ends, and what they tell the scheduler holds."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.program_shapes.bound import least_makespan_s
from benchmarks.program_shapes.regimes import REGIMES
from benchmarks.program_shapes.script import (
    Fork,
    Gen,
    Pause,
    Say,
    Script,
    ScriptBackend,
    run_all,
    run_scripts,
)
from preble_sgl.core import ProgramId, RequestRecord, token_ids
from preble_sgl.global_sched.admission import Mechanisms
from preble_sgl.profiles import load_profile
from preble_sgl.sim.points import Setting


def tiny(policy: str, *, gpus: int = 2, kv_tokens: int = 50_000) -> Setting:
    return Setting(
        policy=policy, gpus=gpus, profile=load_profile("a6000-mistral-7b"), seed=7, kv_tokens=kv_tokens
    )


def shared_document() -> Script:
    """Two notes on 100 tokens, then a verdict."""
    notes = tuple((Say(token_ids([i] * 10)), Gen(token_ids([50 + i] * 4), 5)) for i in (1, 2))
    verdict = (Say(token_ids(range(200, 220))), Pause(8.0, 2.0), Gen(token_ids([60, 61]), 3))
    return Script("notes", (Say(token_ids(range(1000, 1100))), Fork(notes), *verdict))


@pytest.mark.parametrize("policy", ["preble_plan", "round_robin"])
@pytest.mark.parametrize("regime", REGIMES)
def test_every_call_of_every_program_ends_once_and_nothing_stays_open(regime: str, policy: str) -> None:
    setting = tiny(policy)
    scripts, bound_s = REGIMES[regime].scripts(regime, setting)
    backend = ScriptBackend(setting)
    backend.call(lambda: run_all(backend, scripts, REGIMES[regime].rows))
    backend.fleet.check_invariants()
    state = backend.fleet.scheduler.snapshot()
    made = Counter(int(record.program_id, 16) for record in backend.records)
    assert made == {number: script.num_calls for number, script in enumerate(scripts)}
    assert len({record.request_id for record in backend.records}) == len(backend.records)
    assert (state.num_open_programs, state.num_queued, state.num_held, state.num_running) == (0, 0, 0, 0)
    assert not backend.outputs
    assert bound_s < backend.summary().makespan_s
    backend.close()


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    def records(seed_of: str) -> list[RequestRecord]:
        scripts, _ = REGIMES["agents, thrashing"].scripts(seed_of, tiny("preble_plan"))
        return list(run_scripts(tiny("preble_plan"), scripts).records)

    assert records("one") == records("one")
    assert records("one") != records("two")


@pytest.mark.parametrize("regime", REGIMES)
def test_a_hint_promises_at_least_the_widest_that_a_run_really_holds(regime: str) -> None:
    scripts, _ = REGIMES[regime].scripts(regime, tiny("preble_plan"))
    for script in scripts[:3]:
        setting = tiny("preble_plan", gpus=1, kv_tokens=200_000)  # room for all of it: nothing is evicted
        backend = ScriptBackend(setting)
        backend.call(lambda script=script, backend=backend: run_all(backend, [script]))  # type: ignore[misc]
        (worker,) = backend.fleet.scheduler.snapshot().workers
        hint = script.hint(ProgramId("p"))
        assert len(hint.prefixes[0]) <= worker.used_tokens <= (hint.kv_tokens or 0)
        assert any(end[: len(hint.prefixes[0])] == hint.prefixes[0] for end in script.ends())
        backend.close()


def test_a_script_tells_what_a_plan_would_know() -> None:
    hint = shared_document().hint(ProgramId("p"))
    assert hint.kv_tokens == 100 + 2 * (10 + 5) + 20 + 3
    assert hint.prefixes == (token_ids(range(1000, 1100)) + token_ids([1] * 10),)
    assert list(shared_document().calls()) == [(110, 4), (110, 4), (120, 2)]


def test_a_run_forks_joins_and_pauses() -> None:
    records = run_scripts(tiny("preble_plan"), [shared_document()]).records
    by_path = {record.call_path: record for record in records}
    assert sorted(by_path) == ["notes.0/call0", "notes.1/call1", "notes/call2"]
    verdict = by_path.pop("notes/call2")
    assert verdict.usage.prompt_tokens == 120
    assert verdict.submitted_at == 8.0 + max(note.finished_at for note in by_path.values())


def test_a_setting_may_name_the_mechanisms_itself() -> None:
    scripts, _ = REGIMES["judge, in order"].scripts("any", tiny("preble_e2@1"))
    named = run_scripts(tiny("preble_e2@1"), scripts[:8])
    given = run_scripts(replace(tiny("preble_e2"), mechanisms=Mechanisms(open_limit=1)), scripts[:8])
    assert given.records == named.records != run_scripts(tiny("preble_e2"), scripts[:8]).records


def test_requests_need_not_wait_for_a_prefix_that_another_computes() -> None:
    notes = [shared_document()]
    waits = run_scripts(tiny("round_robin", gpus=1), notes).records
    rushes = run_scripts(replace(tiny("round_robin", gpus=1), prefix_first=False), notes).records
    assert [record.placed_at > 0 for record in waits[:2]] == [False, True]
    assert [record.placed_at > 0 for record in rushes[:2]] == [False, False]


def test_programs_begin_when_they_arrive_and_wait_for_a_row() -> None:
    document = token_ids(range(100))
    scripts = [Script("one", (Say(document), Gen(token_ids([1, 2]), 2)), at=at) for at in (0.0, 0.0, 60.0)]
    first, second, late = run_scripts(tiny("round_robin"), scripts, rows=1).records
    assert second.submitted_at == first.finished_at
    assert late.submitted_at == 60.0


def test_the_bound_counts_a_shared_prefix_once() -> None:
    setting = tiny("round_robin", gpus=1)
    heads = [token_ids(range(4096)), token_ids(range(1, 4097))]
    alike = [Script("call", (Say(heads[0] + token_ids([i])), Gen(token_ids([i]), 1))) for i in range(2)]
    others = [Script("call", (Say(heads[i] + token_ids([i])), Gen(token_ids([i]), 1))) for i in range(2)]
    chunk_s = 4.8542e-3 + 0.120473e-3 * 4096  # a chunk of this profile holds one head; attention is extra
    assert least_makespan_s(setting, others) - least_makespan_s(setting, alike) > chunk_s
