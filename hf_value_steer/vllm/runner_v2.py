"""The V2 model runner of vLLM, steered; see `runner`.

It keeps tokens and their number on the device, by slot: `idx_mapping` leads from rows of the batch to slots. Sampling
is a function of seed and position: a pending token that was dropped is drawn again, and is the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from hf_value_steer.vllm.report import RunnerReport
from hf_value_steer.vllm.runner import SteeredRunner
from hf_value_steer.vllm.sampler_v2 import RecordingSampler
from hf_value_steer.vllm.served import ServedMethods


class SteeredModelRunner(SteeredRunner, GPUModelRunner):  # type: ignore[misc]
    """Mixin for a V2 model runner. In each step vLLM calls `execute_model`, and then `sample_tokens`.

    The latter calls `sample`, and `postprocess_sampled`, which stores tokens on the device.

    Attributes:
        sampling_params (`dict`): from request id to its sampling parameters.
        batch: rows of the present step.
        ends (`list` of `int`): number of tokens of each row, the pending one included.
        drawn (`torch.LongTensor` of shape `(rows, 1)`): the tokens that are stored at the end of the step, where
            `booked` `(rows,)` is 1: pending tokens, and for rows without a filter the emitted ones.
        joining (`list` of `int`): rows whose first token is forwarded in this step; from its end on the device is one
            token ahead of the scheduler for good.
    """

    def attach(self, served: ServedMethods) -> None:
        super().attach(served)
        self.sampling_params: dict[str, SamplingParams] = {}
        RecordingSampler.take_the_place_of(self.sampler, self.permissions)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.sampling_params.pop(request_id, None)
        new = {each.req_id: each.sampling_params for each in scheduler_output.scheduled_new_reqs}
        self.sampling_params.update(new)
        return super().execute_model(self.one_ahead(scheduler_output, resumed=new), *args, **kwargs)

    def sample(
        self, hidden_states: Tensor, input_batch: InputBatch, grammar_output: Any
    ) -> tuple[SamplerOutput, Tensor, Tensor]:
        self.batch = input_batch
        self.ends = (input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens).tolist()
        rows, places = self._live_rows(), input_batch.logits_indices
        features = hidden_states[places]
        changed = self.on_features(rows, features)
        if changed:
            hidden_states[places[changed]] = features[changed]
        output, counts, rejected = super().sample(hidden_states, input_batch, grammar_output)
        self.drawn, self.booked = output.sampled_token_ids.clone(), counts.clone()
        self.remember_draw(rows, rows)
        for row, token in self.prescribe(rows, rows).items():
            self.drawn[row, 0] = token
            if not self.request(row).filtering:
                self.emission.put(row, token, self.sampler.drawn_from(row)[1])
        self.joining = [row for row in rows if self.request(row).filtering and not self.filtering(row).ahead]
        if self.joining:
            self._book_first(self.joining)
            self.emit_first(self.joining)
        self.booked[[row for row in rows if self.ends[row] >= self.max_model_len]] = 0  # no room for what was drawn
        self._write(output, counts)
        return output, counts, rejected

    def postprocess_sampled(
        self, idx_mapping: Tensor, sampled_tokens: Tensor, num_sampled: Tensor, num_rejected: Tensor, starts: Tensor
    ) -> None:
        del sampled_tokens, num_sampled  # these are the emitted ones, and pending ones are stored
        super().postprocess_sampled(idx_mapping, self.drawn, self.booked, num_rejected, starts)
        self.req_states.num_computed_tokens.gpu[self._slots(self.joining)] += 1

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        if output is not None:
            reports = {}
            for row in self._live_rows():
                report = reports[self.request_id(row)] = self.request(row).take_report()
                report.tokens = int(row not in self.emission.failed_rows)
            output.model_runner_output.value_steer = RunnerReport(reports, self.emission.failures)
        return output

    def _live_rows(self) -> list[int]:
        """Rows whose prompt is complete."""
        ends = self.batch.num_computed_tokens_np + self.batch.num_scheduled_tokens
        live: list[int] = np.flatnonzero(ends >= self.batch.prefill_len_np).tolist()
        return live

    def _book_first(self, rows: Sequence[int]) -> None:
        """Store the tokens that were drawn just now; at the end of the step only a token that is drawn after them."""
        ones = torch.ones(len(rows), dtype=torch.int32, device=self.device)
        super().postprocess_sampled(self._slots(rows), self.drawn[list(rows)], ones, torch.zeros_like(ones))
        self.booked[list(rows)] = 0
        for row in rows:
            self.ends[row] += 1
            self.filtering(row).ahead = True

    def _write(self, output: SamplerOutput, counts: Tensor) -> None:
        """Put the emitted tokens into the output of the sampler, in place of the drawn ones."""
        emission = self.emission
        output.sampled_token_ids.copy_(self.drawn)
        rows = list(emission.tokens)
        tokens = torch.tensor(list(emission.tokens.values()), dtype=torch.long, device=self.device)
        output.sampled_token_ids[rows, 0] = tokens
        counts[list(emission.failed_rows)] = 0
        told = [index for index, row in enumerate(rows) if row in emission.logprobs]
        if output.logprobs_tensors is None or not told:
            return
        wanted = output.logprobs_tensors.logprobs.shape[1] - 1
        sources = torch.stack([emission.logprobs[rows[index]] for index in told])
        found = self.sampler.logprobs_of(sources, tokens[told], wanted)
        at = [rows[index] for index in told]
        output.logprobs_tensors.logprob_token_ids[at] = found.logprob_token_ids
        output.logprobs_tensors.logprobs[at] = found.logprobs
        output.logprobs_tensors.selected_token_ranks[at] = found.selected_token_ranks

    # How it stores things.

    def _slots(self, rows: Sequence[int]) -> Tensor:
        slots: Tensor = self.batch.idx_mapping[list(rows)]
        return slots

    def request_id(self, row: int) -> str:
        return str(self.batch.req_ids[row])

    def params(self, request_id: str) -> SamplingParams:
        return self.sampling_params[request_id]

    def step(self, row: int) -> int:
        return int(self.ends[row] - self.req_states.prompt_len.np[self.batch.idx_mapping_np[row]])

    def last(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        tokens = self.req_states.last_sampled_tokens[self._slots(rows), 0].tolist()
        return [(self.ends[row] - 1, token) for row, token in zip(rows, tokens, strict=True)]

    def replace_last(self, row: int, position: int, token: int) -> None:
        slot, states = self.batch.idx_mapping_np[row], self.req_states
        counts = self.sampler.penalties_state.output_bin_counts[slot]  # penalties go by them
        counts[states.last_sampled_tokens[slot, 0]] -= 1
        counts[token] += 1
        states.last_sampled_tokens[slot, 0] = token
        states.all_token_ids.gpu[slot, position] = token

    def draw_next(self, rows: Sequence[int], logits: Tensor) -> None:
        slots, numbers = self._slots(rows), self.batch.idx_mapping_np[list(rows)]
        ends = np.array([self.ends[row] for row in rows], dtype=np.int32)
        places = torch.from_numpy(ends).to(self.device, torch.long) - 1
        last = self.req_states.last_sampled_tokens[slots, 0].to(torch.int32)
        tokens, _ = self.sampler.sample(
            logits, slots, slots, numbers, places, last, torch.zeros_like(last), ends, return_logprobs=False
        )
        drawn = range(len(rows))
        self.remember_draw(rows, drawn)
        self.drawn[list(rows), 0] = tokens
        self.booked[list(rows)] = 1
        for row, token in self.prescribe(rows, drawn).items():
            self.drawn[row, 0] = token

    def block_tables_of(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        tables = self.block_tables
        return tables.block_tables[0].gpu[self._slots(rows)], tables.block_sizes[0]
