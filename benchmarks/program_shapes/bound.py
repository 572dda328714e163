"""How fast a batch could be at best: unique prefill once, full decode batches, perfect balance.

Prefill: every token of the prefix tree over all conversations, less those that are generated, once, in full
chunks. Decode: as many requests at a time as there are, or as the KV cache has room for when all that can be
shared is shared; each step reads the whole context of each of its requests. No dependency between calls
counts, and nothing idles. What schedules cannot change, such as reading a shared prefix once per step, is not
assumed.
"""

from collections.abc import Sequence

from benchmarks.program_shapes.script import Script
from preble_sgl.core import common_prefix_len
from preble_sgl.sim.points import Setting

MAX_RUNNING = 512
"""Most requests that one engine runs at a time."""


def least_makespan_s(setting: Setting, scripts: Sequence[Script]) -> float:
    """Return the bound, in seconds. Sorts all conversations: O(n log n) comparisons."""
    return (_prefill_s(setting, scripts) + _decode_s(setting, scripts)) / setting.gpus


def unique_tokens(scripts: Sequence[Script]) -> list[tuple[int, int]]:
    """Return for each conversation, in sorted order, what it adds to the prefix tree and its length."""
    ends = sorted(end.tobytes() for script in scripts for end in script.ends())
    previous, found = b"", []
    for end in ends:
        shared_len = common_prefix_len(previous, end)
        found.append((len(end) // 4 - shared_len, len(end) // 4))
        previous = end
    return found


def _prefill_s(setting: Setting, scripts: Sequence[Script]) -> float:
    step, chunk_tokens = setting.profile.step, setting.profile.chunk_tokens
    added = unique_tokens(scripts)
    num_new = sum(new_len for new_len, _ in added) - _num_output(scripts)
    chunk_s = step.seconds([(chunk_tokens, chunk_tokens)]) - step.attention(chunk_tokens, chunk_tokens)
    attention_s = sum(step.attention(new_len, end_len) for new_len, end_len in added)
    return num_new / chunk_tokens * chunk_s + attention_s


def _decode_s(setting: Setting, scripts: Sequence[Script]) -> float:
    calls = [call for script in scripts for call in script.calls()]
    num_output = _num_output(scripts)
    context = sum(output_len * (prompt_len + output_len / 2) for prompt_len, output_len in calls) / num_output
    kv_len = sum(new_len for new_len, _ in unique_tokens(scripts)) / len(calls)
    fits = (setting.kv_tokens or setting.profile.kv_tokens) / kv_len
    num_running = max(1, round(min(MAX_RUNNING, fits, len(calls) / setting.gpus)))
    return (
        num_output / num_running * setting.profile.step.decodes(1, num_running, round(num_running * context))
    )


def _num_output(scripts: Sequence[Script]) -> int:
    return sum(output_len for script in scripts for _, output_len in script.calls())
