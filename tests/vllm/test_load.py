"""Many clients at once through the real server: nothing is lost, nothing is mixed up.

`HF_VALUE_STEER_LOAD=10000` sends as many requests; a few hundred by default.
"""

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.test_server import launched
from tests.vllm.tiny import VOCABULARY


REQUESTS, CLIENTS = int(os.environ.get("HF_VALUE_STEER_LOAD", "300")), 64
THRESHOLDS, COUNTS = (0.1, 0.3, 0.5, 0.7, 0.999), (2, 4, 8)


@pytest.fixture(scope="module")
def port(folder: Path, spread: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Of the server, and its process id."""
    with launched(folder, spread, tmp_path_factory.mktemp("load") / "log") as (address, process):
        yield int(address.rpartition(":")[2]), process.pid


def _plan(index: int) -> dict[str, Any]:
    """What the request of this number asks for."""
    rng = random.Random(index)
    return {
        "kind": rng.choices(["whole", "stream", "aborted", "malformed"], [48, 45, 5, 2])[0],
        "prompt": [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 40))],
        "max_tokens": rng.randrange(1, 48),
        "threshold": rng.choice(THRESHOLDS),
        "count": rng.choice(COUNTS),
        "seed": index,
    }


def _send(port: int, plan: dict[str, Any]) -> HTTPConnection:
    threshold = "high" if plan["kind"] == "malformed" else plan["threshold"]
    body = {
        "model": "tiny",
        "prompt": plan["prompt"],
        "max_tokens": plan["max_tokens"],
        "seed": plan["seed"],
        "ignore_eos": True,
        "stream": plan["kind"] in ("stream", "aborted"),
        "vllm_xargs": {"filter.threshold": threshold, "filter.num_candidates": plan["count"]},
    }
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def _ask(port: int, plan: dict[str, Any]) -> tuple[str, Any]:
    """`(outcome, report and text)` of one request."""
    connection = _send(port, plan)
    try:
        response = connection.getresponse()
        if plan["kind"] == "aborted":
            response.read(1)
            return "aborted", None
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        return f"HTTP {response.status}", text
    if plan["kind"] == "whole":
        answer = json.loads(text)
        return "answered", (answer["value_steer"], answer["choices"][0]["text"])
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    written = "".join(event["choices"][0]["text"] for event in events if event["choices"])
    return "answered", (events[-1]["value_steer"], written)


def _memory(pid: int) -> int:
    """Resident pages of the server and the processes that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (pid, *children))


@pytest.mark.timeout(3600)
def test_load(port: tuple[int, int], record_property: Any) -> None:
    address, pid = port
    plans = [_plan(index) for index in range(REQUESTS)]
    memory = []

    def ask(index: int) -> tuple[str, Any]:
        if index == REQUESTS // 2:
            memory.append(_memory(pid))
        return _ask(address, plans[index])

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(ask, range(REQUESTS)))
    memory.append(_memory(pid))
    outcomes = Counter(outcome for outcome, _ in answers)
    kinds = Counter(plan["kind"] for plan in plans)
    record_property("outcomes", dict(outcomes))
    record_property("growth", memory[1] / memory[0])
    assert outcomes["aborted"] == kinds["aborted"] and outcomes["HTTP 400"] == kinds["malformed"]
    assert outcomes["answered"] == kinds["whole"] + kinds["stream"]
    for plan, (outcome, answer) in zip(plans, answers, strict=True):
        if outcome == "answered":
            _check(plan, answer[0][0])
    assert memory[1] < 1.05 * memory[0]
    for index in range(0, REQUESTS, max(7, REQUESTS // 60)):  # alone, a request gets what it got among the others
        if answers[index][0] == "answered":
            (alone,), text = _ask(address, plans[index])[1]
            (among,), written = answers[index][1]
            assert (text, alone["interventions"]) == (written, among["interventions"]), plans[index]


def _check(plan: dict[str, Any], report: dict[str, Any]) -> None:
    """The report is that of this request: its length, its threshold, its number of candidates."""
    assert report["tokens"] == len(report["values"]) == plan["max_tokens"] and report["error"] is None
    assert report["candidates_evaluated"] <= plan["count"] * plan["max_tokens"]
    if plan["threshold"] == 0.999:
        assert report["candidates_evaluated"] >= plan["max_tokens"]
    rejected = sum(value >= plan["threshold"] for value in report["values"])
    if rejected == 0 and not report["interventions"]:
        assert report["candidates_evaluated"] == plan["max_tokens"]


@pytest.mark.timeout(900)
def test_a_killed_engine(folder: Path, spread: str, tmp_path: Path) -> None:
    """`kill -9` in mid-load: whoever waits gets an error, after the beginning of the right text or nothing."""
    plans = [{**_plan(index), "kind": ("whole", "stream")[index % 2]} for index in range(160)]
    with launched(folder, spread, tmp_path / "log") as (address, process), ThreadPoolExecutor(CLIENTS) as clients:
        read = partial(_read, int(address.rpartition(":")[2]))
        right = list(clients.map(read, plans))
        answers = [clients.submit(read, plan) for plan in plans]
        answers[40].result()
        os.kill(_engine_of(process.pid), signal.SIGKILL)
        found = [answer.result() for answer in answers]
        process.wait(60)
    assert all(complete for complete, _ in right)
    assert any(text and not complete for complete, text in found), "no stream was broken off"
    for (_, text), (complete, beginning) in zip(right, found, strict=True):
        assert beginning == text if complete else text.startswith(beginning)


def _engine_of(server: int) -> int:
    """The process that runs the model."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    (engine,) = (each for each in children if "EngineCore" in Path(f"/proc/{each}/cmdline").read_text())
    return int(engine)


def _read(port: int, plan: dict[str, Any]) -> tuple[bool, str]:
    """Whether an answer is complete, and as much of its text as there is."""
    text = ""
    try:
        connection = _send(port, plan)
        response = connection.getresponse()
        if plan["kind"] == "whole":
            answer = json.loads(response.read())
            return response.status == 200, answer["choices"][0]["text"] if response.status == 200 else ""
        for line in response:
            event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            if "error" in event:
                return False, text
            text += "".join(choice["text"] for choice in event.get("choices", ()))
            if line.startswith(b"data: [DONE]"):
                return True, text
    except (OSError, HTTPException):
        pass
    return False, text
