"""The V1 model runner of vLLM, steered: one token ahead of the scheduler.

The runner draws one token more than it has emitted, the *pending* token. The ordinary decode step forwards the pending
token where stock vLLM would forward the one before it, so that its feature costs nothing extra. Only then is it
emitted, or replaced by an alternative. A request joins this regime in the step that completes its prompt: its first
token is forwarded, checked and emitted in that same step.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from hf_value_steer.vllm.abstaining import Text, observe
from hf_value_steer.vllm.emission import Emission
from hf_value_steer.vllm.filtering import NO_LOOKAHEAD, NOT_FINITE, Pending, Verdict, check
from hf_value_steer.vllm.judge import values_of
from hf_value_steer.vllm.lookahead import Lookahead
from hf_value_steer.vllm.request import Filtering, SteeredRequest
from hf_value_steer.vllm.sampler import RecordingSampler
from hf_value_steer.vllm.steering import Steering


logger = init_logger(__name__)


class SteeredModelRunner(GPUModelRunner):  # type: ignore[misc]
    """Mixin for a V1 model runner that exists already; [`attach`] has to follow."""

    def attach(self, steering: Steering) -> None:
        """Steer from now on."""
        self.steering = steering
        self.steered: dict[str, SteeredRequest] = {}
        self.lookahead = Lookahead(self)
        self.sampler: RecordingSampler = RecordingSampler(self.sampler)
        self.emission = Emission()

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.steered.pop(request_id, None)
        output = super().execute_model(self._one_ahead(scheduler_output), intermediate_tensors)
        state = self.execute_model_state
        if output is None and state is not None:
            self.emission = Emission()
            features, rows = state.sample_hidden_states, self._live_rows()
            pending = self._pending([row for row in rows if self._is_ahead(row)])
            if pending:
                chosen, changed = self._settle(pending, features[[each.row for each in pending]])
                if changed:
                    at = [pending[index].row for index in changed]
                    features[at] = chosen[changed]
                    state.logits[at] = self.model.compute_logits(chosen[changed]).to(state.logits.dtype)
            self._start_filters([row for row in rows if self._step(row) == 0], features)
            self._observe(rows, features[rows])
        return output

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
        self._remember_draw(drawn)
        self._emit_first([row for row in drawn if self._request(row).filtering and not self._is_ahead(row)])
        records = {batch.req_ids[row]: self._request(row).take_record() for row in range(batch.num_reqs)}
        self.emission.write(output, records)
        return output

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        output = super()._sample(logits, spec_decode_metadata)
        for row, token in self._prescribed(self._live_rows()).items():
            output.sampled_token_ids[row, 0] = token
            if not self._request(row).filtering:
                self.emission.put(row, token, self.sampler.drawn_from(row)[1])
        return output

    # What the scheduler says, one token ahead.

    def _one_ahead(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """The order of the scheduler, for requests of which it knows one token less than the runner."""
        cached = scheduler_output.scheduled_cached_reqs
        ahead = [self._goes_on_ahead(each, each in cached.resumed_req_ids) for each in cached.req_ids]
        if not any(ahead):
            return scheduler_output
        computed = [count + more for count, more in zip(cached.num_computed_tokens, ahead, strict=True)]
        drawn = [count + more for count, more in zip(cached.num_output_tokens, ahead, strict=True)]
        shifted = replace(cached, num_computed_tokens=computed, num_output_tokens=drawn)
        return replace(scheduler_output, scheduled_cached_reqs=shifted)

    def _goes_on_ahead(self, request_id: str, resumed: bool) -> bool:
        """Whether there is a pending token; that of a preempted request is dropped, as if it had not been drawn."""
        steered = self.steered.get(request_id)
        filtering = steered.filtering if steered else None
        if filtering is None or not filtering.ahead:
            return False
        if resumed:
            filtering.ahead = False
            if filtering.generator_state is not None:
                self.requests[request_id].generator.set_state(filtering.generator_state)
        return filtering.ahead

    # Rows of the batch.

    def _request(self, row: int) -> SteeredRequest:
        """What is steered in a row; nothing, and a failure, if its overrides cannot be honoured."""
        request_id = self.input_batch.req_ids[row]
        if request_id not in self.steered:
            params = self.requests[request_id].sampling_params
            try:
                steered = SteeredRequest.start(self.steering, params, request_id)
            except ValueError as error:
                self.emission.fail(row, request_id, str(error))
                steered = SteeredRequest(None, None)
            self.steered[request_id] = steered
        return self.steered[request_id]

    def _live_rows(self) -> list[int]:
        """Rows whose prompt is complete."""
        count = self.input_batch.num_reqs
        return [row for row in range(count) if not self.discard_request_mask.np[row]]

    def _is_ahead(self, row: int) -> bool:
        filtering = self._request(row).filtering
        return filtering is not None and filtering.ahead

    def _step(self, row: int) -> int:
        """Number of new tokens, the pending one included."""
        return len(self.requests[self.input_batch.req_ids[row]].output_token_ids)

    def _fail(self, row: int, reason: str) -> None:
        self.emission.fail(row, self.input_batch.req_ids[row], reason)

    def _prescribed(self, rows: Sequence[int]) -> dict[int, int]:
        """The next tokens of rows that abstention ends."""
        tokens = {row: self._request(row).prescribed(self._step(row)) for row in rows}
        return {row: token for row, token in tokens.items() if token is not None}

    # The filter.

    def _pending(self, rows: Sequence[int]) -> list[Pending]:
        """The pending token of each row."""
        found = []
        for row in rows:
            request, step = self._request(row), self._step(row) - 1
            position = int(self.input_batch.num_tokens_no_spec[row]) - 1
            token = int(self.input_batch.token_ids_cpu[row, position])
            forced = request.prescribed(step) is not None
            assert request.filtering is not None
            found.append(Pending(request.filtering, row, position, token, step, forced))
        return found

    def _settle(self, pending: Sequence[Pending], features: Tensor) -> tuple[Tensor, list[int]]:
        """Check pending tokens `(n,)`, put winners in their place, and note what is to be emitted.

        Returns:
            `(features, changed)`: features `(n, width)` of what is emitted, and which of them are not those given.
        """
        verdicts = check(pending, features, self.steering.heads["filter"], self.lookahead.aside)
        winners = {index: each.winner for index, each in enumerate(verdicts) if each.winner and not each.error}
        try:
            self.lookahead.commit([winner.job for winner in winners.values()])
        except Exception:
            logger.exception("A winner could not be committed; the requests in question end with an error.")
            for index in winners:
                verdicts[index].error = NO_LOOKAHEAD
        if winners:
            features = features.clone()
            features[list(winners)] = torch.stack([winner.feature for winner in winners.values()])
        for each, verdict in zip(pending, verdicts, strict=True):
            self._note(each, verdict)
        return features, list(winners)

    def _note(self, pending: Pending, verdict: Verdict) -> None:
        """Book the winner, and note what is emitted."""
        if verdict.error is not None:
            return self._fail(pending.row, verdict.error)
        request_id, filtering = self.input_batch.req_ids[pending.row], pending.filtering
        state, record = self.requests[request_id], self.steered[request_id].record
        token, record.value = verdict.token, verdict.value
        if token is None:
            token, record.value = filtering.eos, None
            record.abstained = {"step": pending.step, "value": verdict.value, "method": "filter"}
        self.input_batch.token_ids_cpu[pending.row, pending.position] = token
        state.output_token_ids[-1] = token
        record.intervened, record.candidates = token != pending.token, verdict.candidates
        filtering.interventions += record.intervened
        self.emission.put(pending.row, token, filtering.logprobs)

    def _emit_first(self, rows: Sequence[int]) -> None:
        """Forward, check and emit tokens that were drawn just now, and draw the pending ones that follow them."""
        pending = self._pending(rows)
        if not pending:
            return
        try:
            tokens, positions = [each.token for each in pending], [each.position for each in pending]
            features = self.lookahead.in_place(rows, tokens, positions)
        except Exception:
            logger.exception("The first tokens could not be forwarded; their requests end with an error.")
            for row in rows:
                self._fail(row, NO_LOOKAHEAD)
            return
        features, _ = self._settle(pending, features)
        self._observe(rows, features)
        going_on = [index for index, row in enumerate(rows) if not self._is_over(row)]
        if going_on:
            self._draw_next([rows[index] for index in going_on], self.model.compute_logits(features[going_on]))

    def _draw_next(self, rows: Sequence[int], logits: Tensor) -> None:
        """Draw the pending tokens of some rows from `logits` `(rows, vocab)`."""
        batch = self.input_batch
        every = logits.new_zeros(batch.num_reqs, logits.shape[1])
        every[list(rows)] = logits
        for processor in batch.logitsprocs.all:
            processor.update_state(None)
        generators = {row: each for row, each in batch.generators.items() if row in rows}
        self.generator_states = {row: each.get_state() for row, each in generators.items()}
        drawn = self.sampler(every, replace(batch.sampling_metadata, generators=generators))
        tokens = drawn.sampled_token_ids[:, 0].tolist()
        forced = self._prescribed(rows)
        for row in rows:
            end = int(batch.num_tokens_no_spec[row])
            if end < self.max_model_len:
                token = forced.get(row, tokens[row])
                batch.token_ids_cpu[row, end], batch.is_token_ids[row, end] = token, True
                batch.num_tokens_no_spec[row] = end + 1
                self.requests[batch.req_ids[row]].output_token_ids.append(token)
                self._filtering(row).ahead = True
        self._remember_draw(rows)

    def _filtering(self, row: int) -> Filtering:
        filtering = self._request(row).filtering
        assert filtering is not None
        return filtering

    def _remember_draw(self, rows: Sequence[int]) -> None:
        """Keep what the last tokens of filtered rows were drawn from."""
        for row in rows:
            filtering = self._request(row).filtering
            if filtering is not None:
                filtering.scores, filtering.logprobs = self.sampler.drawn_from(row)
                filtering.generator_state = self.generator_states.get(row)

    def _discard_beyond_context(self) -> dict[int, torch.Generator]:
        """Draw nothing for rows whose pending token fills the context; returns their generators, set aside."""
        batch = self.input_batch
        full = [row for row in range(batch.num_reqs) if batch.num_tokens_no_spec[row] >= self.max_model_len]
        self.discard_request_mask.np[full] = True
        return {row: batch.generators.pop(row) for row in full if row in batch.generators}

    # Values of the text so far.

    def _start_filters(self, rows: Sequence[int], features: Tensor) -> None:
        """Value the prompts, on which thresholds may depend."""
        rows = [row for row in rows if self._request(row).filtering]
        if rows:
            values = values_of(self.steering.heads["filter"], features[list(rows)])
            for row, value in zip(rows, values, strict=True):
                if bool(value.isnan()):
                    self._fail(row, NOT_FINITE)
                else:
                    self._request(row).start_at(self._filtering(row).scorer, value)

    def _observe(self, rows: Sequence[int], features: Tensor) -> None:
        """Let abstention look at the texts of some rows, features `(rows, width)`, that are not at their end."""
        texts = [
            Text(self._request(row), abstaining, row, self._step(row), index)
            for index, row in enumerate(rows)
            if (abstaining := self._request(row).abstaining) and not self._is_over(row)
        ]
        if texts:
            values = values_of(self.steering.heads["abstain"], features[[each.index for each in texts]])
            for each in (text for text, value in zip(texts, values, strict=True) if bool(value.isnan())):
                self._fail(each.row, NOT_FINITE)
            finite = [index for index in range(len(texts)) if not bool(values[index].isnan())]
            observe([texts[index] for index in finite], values[finite], self.steering.heads["abstain"])

    def _is_over(self, row: int) -> bool:
        """Whether what is emitted in this step is the last token of the row, or nothing is."""
        request_id = self.input_batch.req_ids[row]
        if request_id in self.emission.failures:
            return True
        token, params = self.emission.tokens.get(row), self.requests[request_id].sampling_params
        if token is None:
            return False
        over = token == params.eos_token_id or token in (params.stop_token_ids or ())
        return over or self._step(row) >= params.max_tokens
