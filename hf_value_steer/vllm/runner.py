"""A model runner of vLLM, steered: one token ahead of the scheduler.

The runner draws one token more than it has emitted, the *pending* token. The ordinary decode step forwards the pending
token where stock vLLM would forward the one before it, so its feature costs nothing extra. Only then is it emitted, or
replaced by an alternative. In the step that completes a prompt, the first token is forwarded at once, checked
and emitted, and the pending token is drawn after it.

This file has what the model runners of vLLM, V1 and V2, have in common. How each of them stores tokens and positions
is in `runner_v1` and `runner_v2`.
"""

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from hf_value_steer.vllm.abstaining import Text, observe
from hf_value_steer.vllm.emission import Emission
from hf_value_steer.vllm.filtering import NO_LOOKAHEAD, NOT_FINITE, Pending, Verdict, check
from hf_value_steer.vllm.judge import values_of
from hf_value_steer.vllm.lookahead import ExtraForwards
from hf_value_steer.vllm.permissions import Permissions
from hf_value_steer.vllm.request import Filtering, SteeredRequest
from hf_value_steer.vllm.served import ServedMethods


logger = init_logger(__name__)


class SteeredRunner(metaclass=ABCMeta):
    """Base of the mixins that steer a model runner of vLLM.

    The runner exists before: the worker changes its class, and then calls [`attach`]. vLLM calls the runner as before;
    the mixins of V1 and V2 call the functions below at the right places of a step.
    """

    model: Any
    sampler: Any
    vllm_config: Any

    def attach(self, served: ServedMethods) -> None:
        """Begin to steer. It does the work of an `__init__`, which has run before the class was changed."""
        self.served = served
        self.steered: dict[str, SteeredRequest] = {}
        self.lookahead = ExtraForwards(self)
        self.emission = Emission()
        self.permissions = Permissions()

    # How a runner stores things. A row is a row of its present batch.

    @abstractmethod
    def request_id(self, row: int) -> str:
        """The request of a row."""

    @abstractmethod
    def params(self, request_id: str) -> SamplingParams:
        """The sampling parameters of a request."""

    @abstractmethod
    def step(self, row: int) -> int:
        """Number of new tokens, the pending one included."""

    @abstractmethod
    def last(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Position and id of the last token of each row."""

    @abstractmethod
    def replace_last(self, row: int, position: int, token: int) -> None:
        """Put another token in the place of the last one, wherever the runner keeps it: the text, penalties."""

    @abstractmethod
    def draw_next(self, rows: Sequence[int], logits: Tensor) -> None:
        """Draw pending tokens from `logits` `(rows, vocab)`, once more in this step."""

    @abstractmethod
    def block_tables_of(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        """A copy of the block tables `(rows, blocks)`, and the number of tokens in a block."""

    # What the scheduler says, one token ahead.

    def one_ahead(self, scheduler_output: SchedulerOutput, resumed: Iterable[str]) -> SchedulerOutput:
        """The order of the scheduler, with one token more for requests that have a pending token.

        The pending token of a preempted request that is `resumed` is dropped, as if it had not been drawn.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.steered.pop(request_id, None)
        for request_id in resumed:
            if filtering := self._ahead(request_id):
                self.drop_pending(request_id, filtering)
        cached = scheduler_output.scheduled_cached_reqs
        ahead = [self._ahead(each) is not None for each in cached.req_ids]
        if not any(ahead):
            return scheduler_output
        computed = [count + more for count, more in zip(cached.num_computed_tokens, ahead, strict=True)]
        drawn = [count + more for count, more in zip(cached.num_output_tokens, ahead, strict=True)]
        shifted = replace(cached, num_computed_tokens=computed, num_output_tokens=drawn)
        return replace(scheduler_output, scheduled_cached_reqs=shifted)

    def drop_pending(self, request_id: str, filtering: Filtering) -> None:  # noqa: ARG002
        """Forget the pending token of a request."""
        filtering.ahead = False

    def _ahead(self, request_id: str) -> Filtering | None:
        """The filter of a request that has a pending token; `None` for others."""
        steered = self.steered.get(request_id)
        filtering = steered.filtering if steered else None
        return filtering if filtering and filtering.ahead else None

    # Rows of the batch.

    def request(self, row: int) -> SteeredRequest:
        """The request of a row. If its overrides cannot be honoured, it steers nothing and ends with an error."""
        request_id = self.request_id(row)
        if request_id not in self.steered:
            try:
                vocabulary = self.vllm_config.model_config.get_vocab_size()
                steered = SteeredRequest.start(self.served, self.params(request_id), request_id, vocabulary)
            except ValueError as error:
                self.emission.fail(row, request_id, str(error))
                steered = SteeredRequest(None, None)
            self.permissions.watch(steered.insertable())
            self.steered[request_id] = steered
        return self.steered[request_id]

    def filtering(self, row: int) -> Filtering:
        """The filter of a row that has one."""
        filtering = self.request(row).filtering
        assert filtering is not None
        return filtering

    def prescribe(self, rows: Sequence[int], drawn: Sequence[int]) -> dict[int, int]:
        """The next tokens of rows that abstention ends: `drawn` are their rows in the last draw."""
        tokens = {}
        for row, index in zip(rows, drawn, strict=True):
            token = self.request(row).prescribe(self.step(row), self.permissions.of(index))
            if token is not None:
                tokens[row] = token
        return tokens

    def _fail(self, row: int, reason: str) -> None:
        self.emission.fail(row, self.request_id(row), reason)

    # One step.

    def on_features(self, rows: Sequence[int], features: Tensor) -> list[int]:
        """Check pending tokens, and value the texts. Called when features are there, and before logits are computed.

        Args:
            rows: of the batch, whose prompt is complete.
            features (`torch.FloatTensor` of shape `(batch, width)`): of the last token of each row of the batch.
                Features of winners are written into it, so that logits are those of the emitted tokens.

        Returns:
            the rows whose features have changed.
        """
        self.emission = Emission()
        pending = self._pending([row for row in rows if self.request(row).filtering and self.filtering(row).ahead])
        changed: list[int] = []
        if pending:  # before the texts are valued: abstention reads the features of winners
            chosen, winners = self._settle(pending, features[[each.row for each in pending]])
            changed = [pending[index].row for index in winners]
            features[changed] = chosen[winners]
        self._start_filters([row for row in rows if self.step(row) == 0], features)
        self._observe(rows, features, rows)
        return changed

    def emit_first(self, rows: Sequence[int]) -> None:
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
        self._observe(rows, features, range(len(rows)))
        going_on = [index for index, row in enumerate(rows) if not self._is_over(row)]
        if going_on:
            self.draw_next([rows[index] for index in going_on], self.model.compute_logits(features[going_on]))

    def remember_draw(self, rows: Sequence[int], drawn: Sequence[int]) -> None:
        """Keep what the last tokens of filtered rows were drawn from: `drawn` are their rows in the last draw."""
        for row, index in zip(rows, drawn, strict=True):
            filtering = self.request(row).filtering
            if filtering is not None:
                filtering.scores, filtering.logprobs = self.sampler.drawn_from(index)
                filtering.permitted = self.permissions.of(index)

    # The filter.

    def _pending(self, rows: Sequence[int]) -> list[Pending]:
        """The pending token of each row."""
        found = []
        for row, (position, token) in zip(rows, self.last(rows), strict=True):
            step = self.step(row) - 1
            forced = self.request(row).is_prescribed(step)
            found.append(Pending(self.filtering(row), row, position, token, step, forced))
        return found

    def _settle(self, pending: Sequence[Pending], features: Tensor) -> tuple[Tensor, list[int]]:
        """Check pending tokens `(n,)`, put winners in their place, and note what is to be emitted.

        Returns:
            `(features, changed)`: features `(n, width)` of what is emitted, and which of them are not those given.
        """
        verdicts = check(pending, features, self.served.heads["filter"], self.lookahead.aside)
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
        """Carry out a verdict: replace the token if there is a winner, and note what is emitted and reported."""
        if verdict.error is not None:
            return self._fail(pending.row, verdict.error)
        filtering, report = pending.filtering, self.request(pending.row).report
        token, report.value = verdict.token, verdict.value
        if token is None:
            token, report.value = filtering.ending[0], None
            report.abstained = {"step": pending.step, "value": verdict.value, "method": "filter"}
        if token != pending.token:
            self.replace_last(pending.row, pending.position, token)
        report.intervened, report.candidates = token != pending.token, verdict.candidates
        report.unacceptable = verdict.token is not None and not verdict.found
        filtering.interventions += report.intervened
        self.emission.put(pending.row, token, filtering.logprobs)

    # Values of the text so far.

    def _start_filters(self, rows: Sequence[int], features: Tensor) -> None:
        """Value the prompts of rows with a filter: thresholds may depend on these values."""
        rows = [row for row in rows if self.request(row).filtering]
        if rows:
            values = values_of(self.served.heads["filter"], features[list(rows)])
            for row, value in zip(rows, values, strict=True):
                if bool(value.isnan()):
                    self._fail(row, NOT_FINITE)
                else:
                    self.request(row).start_at(self.filtering(row).scorer, value)

    def _observe(self, rows: Sequence[int], features: Tensor, places: Sequence[int]) -> None:
        """Give abstention the values of texts that go on; row `rows[i]` has its feature at `places[i]`."""
        texts = [
            Text(self.request(row), abstaining, row, self.step(row), place)
            for row, place in zip(rows, places, strict=True)
            if (abstaining := self.request(row).abstaining) and not self._is_over(row)
        ]
        if texts:
            values = values_of(self.served.heads["abstain"], features[[each.place for each in texts]])
            for each in (text for text, value in zip(texts, values, strict=True) if bool(value.isnan())):
                self._fail(each.row, NOT_FINITE)
            finite = [index for index in range(len(texts)) if not bool(values[index].isnan())]
            observe([texts[index] for index in finite], values[finite], self.served.heads["abstain"])

    def _is_over(self, row: int) -> bool:
        """Whether the row ends in this step: with the token that it emits, or with an error."""
        request_id = self.request_id(row)
        if request_id in self.emission.failures:
            return True
        token, params = self.emission.tokens.get(row), self.params(request_id)
        if token is None:
            return False
        over = token == params.eos_token_id or token in (params.stop_token_ids or ())
        return over or self.step(row) >= params.max_tokens
