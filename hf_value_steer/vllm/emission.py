"""The tokens that a step emits, in place of those that it has drawn."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.sample.sampler import Sampler

from hf_value_steer.vllm.report import RunnerReport, TokenReport


@dataclass
class Emission:
    """Collects the emitted tokens of one step.

    The runner calls [`put`] for rows that emit another token than the drawn one, and [`fail`] for rows that emit none.
    At the end of the step the V1 runner calls [`write`]; the V2 runner, whose output is on the device, reads the
    fields.

    Args:
        tokens (`dict`): from row to the token that is emitted instead of the one that was drawn.
        logprobs (`dict`): from row to the scores `(vocab,)` that its logprobs are read from, where they are asked for.
        failures (`dict`): from request id to the reason why nothing may be emitted.
        failed_rows (`set`): their rows.
    """

    tokens: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    failed_rows: set[int] = field(default_factory=set)

    def put(self, row: int, token: int, logprobs: Tensor | None) -> None:
        """Emit `token`; its logprobs are read from `logprobs` `(vocab,)`."""
        self.tokens[row] = token
        if logprobs is not None:
            self.logprobs[row] = logprobs

    def fail(self, row: int, request_id: str, reason: str) -> None:
        """Emit nothing, and end the request."""
        self.failures[request_id] = reason
        self.failed_rows.add(row)

    def write(self, output: ModelRunnerOutput, reports: dict[str, TokenReport]) -> None:
        """Put tokens, their logprobs and the report into what the runner returns."""
        for row, token in self.tokens.items():
            output.sampled_token_ids[row] = [token]
        for row in self.failed_rows:
            output.sampled_token_ids[row] = []
        self._write_logprobs(output)
        for request_id, report in reports.items():
            report.tokens = len(output.sampled_token_ids[output.req_id_to_index[request_id]])
        output.value_steer = RunnerReport(reports, self.failures)

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
