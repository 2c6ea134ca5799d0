"""The server as its users meet it: one command, HTTP, the OpenAI client."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest


PROMPT = "w10 w20 w30 w40"
ARGUMENTS = ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "8"]
ARGUMENTS += ["--block-size", "32", "--num-gpu-blocks-override", "200", "--served-model-name", "tiny"]


@contextmanager
def launched(folder: Path, head: str, log: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server of its own: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hf_value_steer.cli", "serve", str(folder), "--value-head", head]
    command += ["--threshold", "0.3", "--port", str(port), "--host", "127.0.0.1", *ARGUMENTS]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, process, log)
            yield address, process
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def server(folder: Path, spread: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and its log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with launched(folder, spread, log) as (address, _):
        yield address, log


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(900):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urlopen(f"{address}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(log.read_text()[-3000:])


def _post(address: str, **body: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "seed": 1, **body}
    return json.loads(_open(f"{address}/v1/completions", body))  # type: ignore[no-any-return]


def _open(url: str, body: dict[str, Any]) -> bytes:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return response.read()  # type: ignore[no-any-return]


def test_it_says_what_it_steers(server: tuple[str, Path]) -> None:
    assert "Steering with filter: unnamed attribute (undesirable), threshold 0.3, K=8, lazy" in server[1].read_text()


def test_on_a_cpu_memory_fits_unless_it_is_said(
    folder: Path, accepting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_value_steer.vllm import arguments, server

    asked = []

    async def run_server(args: Any) -> None:
        asked.append(args.gpu_memory_utilization)

    monkeypatch.setattr(server, "run_server", run_server)
    for module in (arguments, server):
        monkeypatch.setattr(module, "cpu_memory", lambda: {"gpu_memory_utilization": 0.37})
    for said in ([], ["--gpu-memory-utilization", "0.92"], ["--gpu-memory-utilization=0.5"]):
        server.serve(str(folder), accepting, said)
    assert asked == [0.37, 0.92, 0.5]  # 0.92 is vLLM's own default


def test_reports_in_responses(server: tuple[str, Path]) -> None:
    answer = _post(server[0], ignore_eos=True)
    (report,) = answer["value_steer"]
    assert report["tokens"] == len(report["values"]) == 16 and report["interventions"]
    assert report["threshold"] == pytest.approx(0.3)
    assert report["unacceptable"] == [place for place, value in enumerate(report["values"]) if value >= 0.3]
    few = _post(server[0], ignore_eos=True, vllm_xargs={"filter.num_candidates": 2})["value_steer"][0]
    assert few["unacceptable"] == [place for place, value in enumerate(few["values"]) if value >= 0.3] != []
    off = _post(server[0], ignore_eos=True, vllm_xargs={"filter": "off"})
    assert off["value_steer"][0]["values"] == [] and off["choices"] != answer["choices"]
    free = _post(server[0], ignore_eos=True, vllm_xargs={"filter.threshold": 0.999})
    assert free["value_steer"][0]["interventions"] == []
    assert free["choices"][0]["text"] == off["choices"][0]["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_its_report(server: tuple[str, Path], stream: bool) -> None:
    """In the order of the choices: those of the first prompt, then those of the second."""
    alone = [_post(server[0], seed=seed, ignore_eos=True)["value_steer"][0] for seed in (1, 2)]
    before = _metrics(server[0])
    body = {
        "model": "tiny",
        "prompt": [PROMPT, f"{PROMPT} w9"],
        "n": 2,
        "seed": 1,
        "max_tokens": 16,
        "temperature": 1.0,
    }
    text = _open(f"{server[0]}/v1/completions", {**body, "ignore_eos": True, "stream": stream}).decode()
    answer = json.loads(text.split("\n\n")[-3].removeprefix("data: ")) if stream else json.loads(text)
    reports = answer["value_steer"]
    assert [len(report["values"]) for report in reports] == [16] * 4
    for mine, theirs in zip(reports, alone, strict=False):
        assert mine["interventions"] == theirs["interventions"]
        assert mine["values"] == pytest.approx(theirs["values"], abs=1e-5)
    assert answer.get("kv_transfer_params") is None
    assert _metrics(server[0])["value_steer_requests_total"] - before["value_steer_requests_total"] == 4


def test_a_stream_ends_with_its_report(server: tuple[str, Path]) -> None:
    whole = _post(server[0], ignore_eos=True)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "seed": 1, "ignore_eos": True, "stream": True}
    lines = _open(f"{server[0]}/v1/completions", body).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [event["value_steer"] for event in events if "value_steer" in event] == [whole["value_steer"]]
    assert "value_steer" in events[-1] and len(events) == 16
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    usage = _open(f"{server[0]}/v1/completions", {**body, "stream_options": {"include_usage": True}}).decode()
    *_, last, told = [json.loads(line.removeprefix("data: ")) for line in usage.split("\n\n")[:-2]]
    assert last["value_steer"] == whole["value_steer"] and told["choices"] == [] and told["usage"]["completion_tokens"]


def test_a_stream_that_ends_in_an_error_keeps_its_report() -> None:
    """Whether a choice had ended before, or none."""
    from hf_value_steer.vllm.http import _Response

    begun, ended = (
        b'data: {"id":"x","choices":[{"text":"a"}]}',
        b'data: {"id":"x","choices":[{"finish_reason":"stop"}]}',
    )
    error, done = b'data: {"error":{"code":500}}', b"data: [DONE]"
    for events in ([begun, error, done], [begun, ended, error, done]):
        sent: list[Any] = []

        async def forward(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        async def play(events: list[bytes] = events, forward: Any = forward) -> None:
            response = _Response(forward, [[{"tokens": 1}]])
            headers = [(b"content-type", b"text/event-stream")]
            await response.send({"type": "http.response.start", "status": 200, "headers": headers})
            for event in events:
                await response.send({"type": "http.response.body", "body": event + b"\n\n", "more_body": True})
            await response.send({"type": "http.response.body", "body": b"", "more_body": False})

        asyncio.run(play())
        bodies = [message["body"].strip() for message in sent[1:-1]]
        told = json.loads(bodies[-2].removeprefix(b"data: "))
        assert bodies[:-2] == events[:-1] and bodies[-1] == done
        assert told == {"id": "x", "choices": [], "value_steer": [{"tokens": 1}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"vllm_xargs": {"filter.threshold": 2}}, "`filter.threshold` has to be a number in (0, 1), got 2"),
        (
            {"vllm_xargs": {"filter": "off", "filter.threshold": 5}},
            "`filter.threshold` has to be a number in (0, 1), got 5",
        ),
        ({"vllm_xargs": {"filter.alpha": 0.1}}, "no calibration.json"),
        ({"vllm_xargs": {"filter.thresh": 0.1}}, "filter.thresh"),
        ({"vllm_xargs": {"filter_threshold": 0.1}}, "did you mean `filter.threshold`"),
        ({"response_format": {"type": "json_object"}}, "structured outputs"),
        ({"use_beam_search": True, "n": 2, "seed": None}, "beam search"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_gets_its_reason(
    server: tuple[str, Path], stream: bool, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(HTTPError) as caught:
        _post(server[0], **body, stream=stream)
    assert caught.value.code == 400
    assert message in json.loads(caught.value.read())["error"]["message"]
    assert _post(server[0])["choices"]


def test_the_openai_client(server: tuple[str, Path]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none")
    options = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12, "seed": 3}
    extra = {"vllm_xargs": {"filter.threshold": 0.2, "filter.num_candidates": 4}}
    answer = client.chat.completions.create(**options, extra_body=extra, logprobs=True)
    (report,) = answer.value_steer
    assert report["tokens"] == len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    chunks = list(client.chat.completions.create(**options, extra_body=extra, stream=True))
    assert chunks[-1].value_steer == [report]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="filter.alpha"):
        client.chat.completions.create(**options, extra_body={"vllm_xargs": {"filter.alpha": "x"}})


def _metrics(address: str) -> dict[str, float]:
    with urlopen(f"{address}/metrics", timeout=10) as response:
        lines = (line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
        return {name: float(number) for name, number in lines}


def test_metrics(server: tuple[str, Path]) -> None:
    _post(server[0])
    metrics = _metrics(server[0])
    assert metrics["value_steer_requests_total"] >= 1
    assert metrics["value_steer_tokens_total"] >= metrics["value_steer_interventions_total"] > 0
    assert any(name.startswith("vllm:") for name in metrics)
