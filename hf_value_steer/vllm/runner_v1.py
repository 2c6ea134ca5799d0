"""The V1 model runner of vLLM, steered; see `runner`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hf_value_steer.vllm.request import Filtering
from hf_value_steer.vllm.runner import SteeredRunner
from hf_value_steer.vllm.sampler_v1 import RecordingSampler
from hf_value_steer.vllm.served import ServedMethods


class SteeredModelRunner(SteeredRunner, GPUModelRunner):  # type: ignore[misc]
    """Mixin for a V1 model runner. In each step vLLM calls `execute_model`, then `sample_tokens`."""

    def attach(self, served: ServedMethods) -> None:
        super().attach(served)
        self.sampler: RecordingSampler = RecordingSampler(self.sampler, self.permissions)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        with self._features_before_logits() as seen:
            output = super().execute_model(self.one_ahead(scheduler_output, resumed), intermediate_tensors)
        if self.execute_model_state is not None and not seen:
            raise RuntimeError("Logits were computed before tokens were checked: this vLLM cannot be steered.")
        return output

    @contextmanager
    def _features_before_logits(self) -> Iterator[list[Tensor]]:
        """Call [`on_features`] before the model computes logits: those have to be of the tokens that are emitted."""
        seen: list[Tensor] = []
        own = self.model.compute_logits

        def compute_logits(features: Tensor) -> Tensor:
            self.on_features(self._live_rows(), features)
            seen.append(features)
            return own(features)  # type: ignore[no-any-return]

        self.model.compute_logits = compute_logits
        try:
            yield seen
        finally:
            del self.model.compute_logits

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.execute_model_state is None:
            return super().sample_tokens(grammar_output)
        batch = self.input_batch
        self.generator_states = {row: each.get_state() for row, each in batch.generators.items()}
        set_aside = self._discard_beyond_context()
        output = super().sample_tokens(grammar_output)
        batch.generators.update(set_aside)
        drawn = [row for row in self._live_rows() if output.sampled_token_ids[row]]
        self.remember_draw(drawn, drawn)
        self.emit_first([row for row in drawn if self.request(row).filtering and not self.filtering(row).ahead])
        reports = {batch.req_ids[row]: self.request(row).take_report() for row in range(batch.num_reqs)}
        self.emission.write(output, reports)
        return output

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        output = super()._sample(logits, spec_decode_metadata)
        rows = self._live_rows()
        for row, token in self.prescribe(rows, rows).items():
            output.sampled_token_ids[row, 0] = token
            if not self.request(row).filtering:
                self.emission.put(row, token, self.sampler.drawn_from(row)[1])
        return output

    def _live_rows(self) -> list[int]:
        """Rows whose prompt is complete."""
        count = self.input_batch.num_reqs
        return [row for row in range(count) if not self.discard_request_mask.np[row]]

    def _discard_beyond_context(self) -> dict[int, torch.Generator]:
        """Draw nothing for rows whose pending token fills the context; returns their generators, which must rest."""
        batch = self.input_batch
        full = [row for row in range(batch.num_reqs) if batch.num_tokens_no_spec[row] >= self.max_model_len]
        self.discard_request_mask.np[full] = True
        return {row: batch.generators.pop(row) for row in full if row in batch.generators}

    # How it stores things.

    def request_id(self, row: int) -> str:
        return str(self.input_batch.req_ids[row])

    def params(self, request_id: str) -> SamplingParams:
        return self.requests[request_id].sampling_params

    def step(self, row: int) -> int:
        return len(self.requests[self.request_id(row)].output_token_ids)

    def last(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        batch = self.input_batch
        positions = [int(batch.num_tokens_no_spec[row]) - 1 for row in rows]
        return [(place, int(batch.token_ids_cpu[row, place])) for row, place in zip(rows, positions, strict=True)]

    def replace_last(self, row: int, position: int, token: int) -> None:
        self.input_batch.token_ids_cpu[row, position] = token
        self.requests[self.request_id(row)].output_token_ids[-1] = token

    def draw_next(self, rows: Sequence[int], logits: Tensor) -> None:
        batch = self.input_batch
        # The sampler's metadata is about the whole batch: other rows get logits that nobody reads.
        every = logits.new_zeros(batch.num_reqs, logits.shape[1])
        every[list(rows)] = logits
        for processor in batch.logitsprocs.all:
            processor.update_state(None)
        # Other rows must not advance their generators: they have drawn in this step.
        generators = {row: each for row, each in batch.generators.items() if row in rows}
        self.generator_states = {row: each.get_state() for row, each in generators.items()}
        drawn = self.sampler(every, replace(batch.sampling_metadata, generators=generators))
        tokens = drawn.sampled_token_ids[:, 0].tolist()
        forced = self.prescribe(rows, rows)
        for row in rows:
            end = int(batch.num_tokens_no_spec[row])
            if end < self.max_model_len:
                token = forced.get(row, tokens[row])
                batch.token_ids_cpu[row, end], batch.is_token_ids[row, end] = token, True
                batch.num_tokens_no_spec[row] = end + 1
                self.requests[batch.req_ids[row]].output_token_ids.append(token)
                self.filtering(row).ahead = True
        self.remember_draw(rows, rows)

    def remember_draw(self, rows: Sequence[int], drawn: Sequence[int]) -> None:
        super().remember_draw(rows, drawn)
        for row in rows:
            if self.request(row).filtering:
                self.filtering(row).generator_state = self.generator_states.get(row)

    def drop_pending(self, request_id: str, filtering: Filtering) -> None:
        super().drop_pending(request_id, filtering)
        if filtering.generator_state is not None:
            self.requests[request_id].generator.set_state(filtering.generator_state)

    def block_tables_of(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        table = self.input_batch.block_table[0]
        tables = table.get_device_tensor(self.input_batch.num_reqs)
        return tables[torch.tensor(rows, device=tables.device)], table.block_size
