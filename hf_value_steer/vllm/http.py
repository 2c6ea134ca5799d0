"""Steering reports in the responses of vLLM's HTTP server, and as Prometheus metrics beside its own.

A JSON response gets a field `value_steer`, a list with the report of each choice; in a stream it is in the last chunk
that has a choice, or, if the stream ends in an error, in one more chunk without choices. vLLM begins a stream before
it checks whether the request can be steered. So the status of a stream is held back until its first event: a request
that is refused gets HTTP 400 there, too.
"""

import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


# The reports of the response that is being made: a list for each prompt of the request.
_REPORTS: ContextVar[list[list[dict[str, Any]]]] = ContextVar("value_steer_reports")
_DONE, _ERROR, _FINISH = b"data: [DONE]", b'data: {"error"', b'"finish_reason":"'
_NO_CHOICE = b'"choices":[]'  # as in the chunk that holds the usage

_REQUESTS = Counter("value_steer_requests", "Finished requests.")
_TOKENS = Counter("value_steer_tokens", "Tokens of finished requests.")
_INTERVENTIONS = Counter("value_steer_interventions", "Tokens that are not the natural sample.")
_UNACCEPTABLE = Counter("value_steer_unacceptable", "Tokens that the filter let pass although not acceptable.")
_CANDIDATES = Counter("value_steer_candidates", "Candidates that were forwarded.")
_ABSTAINED = Counter("value_steer_abstained", "Requests that were ended early.", ["method"])
_ERRORS = Counter("value_steer_errors", "Requests that were ended because a token could not be checked.")


def count(report: dict[str, Any]) -> None:
    """Add one request to the metrics."""
    _REQUESTS.inc()
    _TOKENS.inc(report["tokens"])
    _INTERVENTIONS.inc(len(report["interventions"]))
    _UNACCEPTABLE.inc(len(report["unacceptable"]))
    _CANDIDATES.inc(report["candidates_evaluated"])
    _ERRORS.inc(report["error"] is not None)
    if report["abstained"]:
        _ABSTAINED.labels(report["abstained"]["method"]).inc()


class WatchedOutputs:
    """Stands in for `OutputProcessor.process_outputs`: it keeps the report of every choice of a request."""

    def __init__(self, processor: Any):
        self.processor, self.process = processor, processor.process_outputs
        self.reports: defaultdict[str, dict[int, dict[str, Any]]] = defaultdict(dict)

    def __call__(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            state = self.processor.request_states.get(output.request_id)
            report = (output.kv_transfer_params or {}).get("value_steer")
            if report and state is not None:
                self.reports[state.external_req_id][state.request_index] = report
        return self.process(outputs, *args, **kwargs)

    def take(self, request_id: str) -> list[dict[str, Any]]:
        """Reports of a request in the order of its choices. They are forgotten here."""
        return [report for _, report in sorted(self.reports.pop(request_id, {}).items())]


class WatchedGenerate:
    """Stands in for `EngineClient.generate`: when a request ends, it adds its reports to the list of the response."""

    def __init__(self, generate: Any, outputs: WatchedOutputs):
        self.generate, self.outputs = generate, outputs

    async def __call__(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        reports: list[dict[str, Any]] = []
        _REPORTS.get([]).append(reports)
        try:
            async with aclosing(self.generate(prompt, sampling_params, request_id, *args, **kwargs)) as outputs:
                async for output in outputs:
                    if output.finished:
                        reports += self.outputs.take(request_id)
                        for report in reports:
                            count(report)
                    yield output
        finally:
            self.outputs.take(request_id)


class SteeringReports:
    """ASGI middleware: `--middleware hf_value_steer.vllm.http.SteeringReports`.

    The server calls it for each HTTP request. At the first one it wraps the functions of the engine's client.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        client = scope["app"].state.engine_client
        if not isinstance(client.generate, WatchedGenerate):
            outputs = WatchedOutputs(client.output_processor)
            client.output_processor.process_outputs = outputs
            client.generate = WatchedGenerate(client.generate, outputs)
        reports: list[list[dict[str, Any]]] = []
        _REPORTS.set(reports)
        await self.app(scope, receive, _Response(send, reports).send)


class _Response:
    """One response on its way out: the application calls [`send`], which passes messages on with the reports added."""

    def __init__(self, forward: Send, told: list[list[dict[str, Any]]]):
        self.forward, self.told = forward, told
        self.part: Send = forward
        self.body = b""
        self.held: Message | None = None
        self.event, self.has_told = b"data: {}", False

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The reports of all choices, in the order of the prompts."""
        return [report for reports in self.told for report in reports]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            await self.part(message)
            return
        if message["type"] == "http.response.start":
            self.start, kind = message, MutableHeaders(scope=message).get("content-type", "")
            if kind == "application/json":
                self.part = self._gather
                return
            if kind.startswith("text/event-stream"):
                self.part = self._begin_stream
                return
        await self.forward(message)

    async def _gather(self, message: Message) -> None:
        self.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        if self.reports:
            content = json.loads(self.body)
            if "kv_transfer_params" in content:  # where vLLM puts that of one choice
                content["kv_transfer_params"] = None
            self.body = json.dumps({**content, "value_steer": self.reports}).encode()
        await self._send_json(self.body)

    async def _begin_stream(self, message: Message) -> None:
        body = message.get("body", b"")
        if not body.startswith(_ERROR):
            self.part = self._pass_event
            await self.forward(self.start)
            await self._pass_event(message)
            return
        self.part = _drop
        error = json.loads(body.partition(b"\n\n")[0].removeprefix(b"data: "))
        self.start["status"] = error["error"]["code"]
        MutableHeaders(scope=self.start)["content-type"] = "application/json"
        await self._send_json(json.dumps(error).encode())

    async def _send_json(self, body: bytes) -> None:
        MutableHeaders(scope=self.start)["content-length"] = str(len(body))
        await self.forward(self.start)
        await self.forward({"type": "http.response.body", "body": body})

    async def _pass_event(self, message: Message) -> None:
        """Pass an event on. One that ends a choice waits for the next: the last that has a choice has the reports."""
        body = message.get("body", b"")
        if self.held is not None:
            held, self.held = self.held, None
            over = body.startswith(_DONE) or _NO_CHOICE in body or not message.get("more_body", False)
            await self.forward(self._with_reports(held) if over and self.reports else held)
        if body.startswith(b"data: {") and not body.startswith(_ERROR):
            self.event = body
        if _FINISH in body and body.count(b"data: ") == 1:
            self.held = message
            return
        if body.startswith(_DONE) and self.reports and not self.has_told:  # it has ended in an error
            await self.forward(self._with_reports({**message, "body": self.event}, choices=[]))
        await self.forward(message)

    def _with_reports(self, message: Message, **changes: Any) -> Message:
        """A message of one event, with the reports in it."""
        self.has_told = True
        chunk = {**json.loads(message["body"].removeprefix(b"data: ")), **changes}
        event = json.dumps({**chunk, "value_steer": self.reports}, ensure_ascii=False)
        return {**message, "body": f"data: {event}\n\n".encode()}


async def _drop(_message: Message) -> None:
    """Send nothing: the error was the whole response."""
