"""What a request wants of the fleet, without its HTTP: it may have come to another process."""

from dataclasses import dataclass

from preble_sgl.core import ProgramId, Request, RequestId, SamplingParams, TokenIds, token_ids
from preble_sgl.server.programs import Clue
from preble_sgl.server.tenants import Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One request. `prompt`: packed token ids. `timeout_s`: what it may take; None: as long as it takes."""

    request_id: RequestId
    path: str
    prompt: bytes
    max_new_tokens: int
    tenant: Tenant
    namespace: str
    clue: Clue
    timeout_s: float | None

    def request(self, program_id: ProgramId, expected_output_len: int | None) -> Request:
        """Return the request as the scheduler sees it."""
        return Request(
            request_id=self.request_id,
            program_id=program_id,
            call_path=self.path,
            prompt=self.token_ids,
            sampling=SamplingParams(max_new_tokens=self.max_new_tokens),
            expected_output_len=expected_output_len,
            tenant=self.tenant.name,
            namespace=self.namespace,
        )

    @property
    def token_ids(self) -> TokenIds:
        """The prompt, unpacked."""
        ids = token_ids()
        ids.frombytes(self.prompt)
        return ids

    @property
    def num_prompt_tokens(self) -> int:
        """How long the prompt is."""
        return len(self.prompt) // token_ids().itemsize
