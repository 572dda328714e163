"""Requests for experiments on real runtimes."""

from collections.abc import Sequence

from preble_sgl.core import ProgramId, Request, SamplingParams, new_request_id, token_ids


def request(prompt: Sequence[int], output_len: int) -> Request:
    """Return a request that generates exactly so many tokens."""
    return Request(
        request_id=new_request_id(),
        program_id=ProgramId("p"),
        call_path="p",
        prompt=token_ids(prompt),
        sampling=SamplingParams(max_new_tokens=output_len, ignore_eos=True),
    )
