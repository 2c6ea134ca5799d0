"""What a step emits in place of the tokens that were drawn in it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.sampler import Sampler

from hf_value_steer.vllm.report import StepRecord, StepReport


@dataclass
class Emission:
    """Collects the emitted tokens of one step.

    Args:
        tokens (`dict`): from row to the token that is emitted instead of the one that was drawn.
        logprobs (`dict`): from row to what its logprobs are read from, `(vocab,)`, where they are asked for.
        failures (`dict`): from request id to the reason why nothing may be emitted.
        failed_rows (`set`): their rows.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    failed_rows: set[int] = field(default_factory=set)

    def put(self, row: int, token: int, logprobs: Tensor | None) -> None:
        """Emit `token`, which was drawn from what has these `logprobs`."""
        self.tokens[row] = token
        if logprobs is not None:
            self.logprobs[row] = logprobs

    def fail(self, row: int, request_id: str, reason: str) -> None:
        """Emit nothing, and end the request."""
        self.failures[request_id] = reason
        self.failed_rows.add(row)

    def write(self, output: ModelRunnerOutput, records: dict[str, StepRecord]) -> None:
        """Put tokens, their logprobs and the report into what the runner returns."""
        for row, token in self.tokens.items():
            output.sampled_token_ids[row] = [token]
        for row in self.failed_rows:
            output.sampled_token_ids[row] = []
        self._write_logprobs(output)
        for request_id, record in records.items():
            record.tokens = len(output.sampled_token_ids[output.req_id_to_index[request_id]])
        output.value_steer = StepReport(records, self.failures)

    def _write_logprobs(self, output: ModelRunnerOutput) -> None:
        rows = [row for row in self.tokens if row in self.logprobs]
        if output.logprobs is None or not rows:
            return
        wanted = output.logprobs.logprobs.shape[1] - 1
        tokens = torch.tensor([self.tokens[row] for row in rows], device=self.logprobs[rows[0]].device)
        found = Sampler.gather_logprobs(torch.stack([self.logprobs[row] for row in rows]), wanted, tokens).tolists()
        output.logprobs.logprob_token_ids[rows] = found.logprob_token_ids
        output.logprobs.logprobs[rows] = found.logprobs
        output.logprobs.sampled_token_ranks[rows] = found.sampled_token_ranks
