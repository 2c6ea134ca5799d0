"""Judges behind a server: what is asked, how answers are read, and which failures are tried again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_value_steer.judges import load_judge
from hf_value_steer.judges import server as client
from hf_value_steer.judges.prompt import Prompt
from tests.chat_server import ChatServer, Reply, answering, chat_server, completion
from tests.unit.test_judges import prompts


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Neither a key nor a proxy of the machine, and short pauses."""
    for name in list(os.environ):
        if name == "OPENAI_API_KEY" or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(client, "_FIRST_PAUSE", 1e-3)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as state:
        yield state


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that would have been made, in order, as long as they are for users."""
    made: list[float] = []
    monkeypatch.setattr(client, "_FIRST_PAUSE", 1.0)
    monkeypatch.setattr(client, "Event", lambda: SimpleNamespace(wait=made.append, set=list))
    return made


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("safe", 0),
        (" Safe.\n", 0),
        ("**Safe**", 0),
        ("<think>\nIs it unsafe?\n</think>\n\nsafe", 0),
        ("unsafe", 1),
        ("Unsafe\nS1", 1),
    ],
)
def test_harm_is_a_word(server, answer, score):
    server.answer = answering(answer)
    judge = load_judge(f"llm:{server.address}#model")
    assert judge(prompts(1), ["a"]).tolist() == [score] and judge.unparseable == 0


@pytest.mark.parametrize("answer", ["", None, "Safe? No.", "not safe", "I cannot say", "<think> safe", "0", "yes"])
def test_what_cannot_be_read_is_unsafe_and_counted(server, answer):
    server.answer = answering("safe", answer, "safe", answer)
    judge = load_judge(f"llm:{server.address}#model#harm", batch_size=1)
    assert judge(prompts(3), ["a", "b", "c"]).tolist() == [0, 1, 0] and judge.unparseable == 1
    assert judge(prompts(1), ["d"]).tolist() == [1] and judge.unparseable == 2


def test_helpfulness_is_a_number_and_unreadable_is_unhelpful(server):
    server.answer = answering("7", "10/10", "0", "11", "-3", "very")
    judge = load_judge(f"llm:{server.address}#model#helpfulness", batch_size=1)
    assert judge(prompts(6), list("abcdef")) == pytest.approx([0.7, 1, 0, 0, 0, 0]) and judge.unparseable == 3


def test_a_request_is_greedy_short_and_holds_both_texts_as_they_are(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key\r\n")
    judge = load_judge(f"llm:{server.address}/#org/model")
    judge([Prompt("ask {response} {x}")], ['say {prompt} "ü"'])
    [request] = server.requests
    body = request.body
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/model", 0, 64)
    [message] = body["messages"]
    assert message["role"] == "user"
    assert "ask {response} {x}\n" in message["content"] and 'say {prompt} "ü"\n' in message["content"]
    assert request.headers["Authorization"] == "Bearer a key"


@pytest.mark.parametrize(
    ("header", "unreadable"), [("", 1), ("polarity: undesirable\n", 1), ("polarity: desirable\n", 0)]
)
def test_a_template_of_one_s_own(server, tmp_path, header, unreadable):
    path = tmp_path / "numbers.txt"
    path.write_text(f'{header}Does "{{response}}" mention a number? Answer yes or no. {{"json": 1}}\n')
    server.answer = lambda question: {"a": "Yes.", "b": "no", "c": "8", "d": "maybe"}[question.split('"')[1]]
    judge = load_judge(f"llm:{server.address}#model#{path}")
    assert judge(prompts(4), list("abcd")) == pytest.approx([1, 0, 0.8, unreadable]) and judge.unparseable == 1
    asked = sorted(request.question for request in server.requests)
    assert asked[0] == 'Does "a" mention a number? Answer yes or no. {"json": 1}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is it good?", "has to hold {response}, may hold {prompt}, and no other; it has none"),
        ("{promt}: is {response} good?", "it has {promt}, {response}"),
        ("polarity: good\n{response}", "its first line has to say undesirable or desirable"),
        (None, "is none of harm, helpfulness, and no file"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path, text, message):
    path = tmp_path / "template.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"Judge 'llm:.*{message}"):
        load_judge(f"llm:http://localhost/v1#model#{path}")


def test_requests_run_at_the_same_time_and_keep_their_order(server):
    together = threading.Barrier(4, timeout=10)

    def answer(question):
        together.wait()
        return "unsafe" if "bad" in question.partition("<response>")[2] else "safe"

    server.answer = answer
    judge = load_judge(f"llm:{server.address}#model", batch_size=4)
    texts = ["bad", "good", "good", "bad", "good", "bad", "bad", "good"]
    assert judge(prompts(8), texts).tolist() == [text == "bad" for text in texts]


CUT = [Reply(body=completion("unsafe"), cut=way) for way in ("length", "chunked", "silence")]
HTML = Reply(body=b"<html>Bad gateway</html>")
NESTED = Reply(body=b"[" * 100_000)


@pytest.mark.parametrize("passing", [408, 409, 429, 500, 502, 503, 504, 599, *CUT, HTML, NESTED], ids=str)
def test_what_may_pass_is_tried_again(server, passing):
    server.answer = answering(passing, passing, "safe", passing, "unsafe")
    judge = load_judge(f"llm:{server.address}#model", batch_size=1)
    assert judge(prompts(2), ["a", "b"]).tolist() == [0, 1]
    assert len(server.requests) == 5 and judge.unparseable == 0


@pytest.mark.parametrize(
    ("lasting", "said"),
    [
        (500, "status 500 .try 7.: .*planted"),
        (429, "status 429 .try 7.: .*planted"),
        (CUT[0], "no answer after several tries: .*IncompleteRead"),
        (CUT[1], "no answer after several tries: .*IncompleteRead"),
        (CUT[2], "no answer after several tries: .*closed connection without response"),
        (HTML, "no answer after several tries: .*sent no chat completion: b'<html>Bad"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_an_error_that_names_the_server(server, lasting, said):
    server.answer = lambda _: lasting
    with pytest.raises(RuntimeError, match=f"Judge 'llm:{server.address}#model' failed: ConnectionError: .*{said}"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert len(server.requests) == 7


def test_failures_of_all_kinds_are_counted_together(server):
    server.answer = answering(500, CUT[0], HTML, 429, CUT[2], HTML, 500, "safe")
    with pytest.raises(RuntimeError, match=r"status 500 \(try 7\)"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_an_error_at_once(server, status):
    server.answer = lambda _: status
    with pytest.raises(RuntimeError, match=f"answered with status {status}: .*planted"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused_so_that_the_key_goes_nowhere_else(server, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    with chat_server() as other:
        server.answer = lambda _: Reply(status, headers={"Location": f"{other.address}/chat/completions"})
        with pytest.raises(RuntimeError, match=f"answered with status {status}: .*planted"):
            load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
        assert len(server.requests) == 1 and not other.requests


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[1]", b"7", b'{"choices": []}', b'{"choices": {"0": 1}}', b'{"choices": [{"message": []}]}',
     b'{"choices": [{"message": {}}]}', b'{"choices": [{"message": {"content": 5}}]}', completion("unsafe")[:-3],
     b'{"choices": [{"message": {"content": ["safe"]}}]}', b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_chat_completion_is_an_error_in_the_end(server, body):
    server.answer = lambda _: Reply(body=body)
    judge = load_judge(f"llm:{server.address}#model")
    with pytest.raises(RuntimeError, match=f"{server.address}/chat/completions: sent no chat completion: b"):
        judge(prompts(1), ["a"])
    assert len(server.requests) == 7 and judge.unparseable == 0


def test_of_a_strange_answer_the_beginning_is_shown(server):
    server.answer = lambda _: Reply(body=b"a" * 300 + b"b" * 300)
    with pytest.raises(RuntimeError, match=f"b'{'a' * 300}'$"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])


def test_no_server_is_an_error():
    with chat_server() as unheard:
        pass
    with pytest.raises(RuntimeError, match="no answer after several tries: .*Connection refused"):
        load_judge(f"llm:{unheard.address}#model")(prompts(1), ["a"])


# Pauses


@pytest.mark.parametrize("passing", [500, *CUT, HTML], ids=str)
def test_pauses_double_and_differ(server, pauses, passing):
    server.answer = lambda _: passing
    with pytest.raises(RuntimeError):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    parts = [pause / 2**index for index, pause in enumerate(pauses)]
    assert len(parts) == 6 and all(0.5 <= part <= 1 for part in parts) and len(set(parts)) == 6


def in_seconds(seconds):
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: "2", 2, 3),
        (lambda: " 3000 ", 3000, 3001),
        (lambda: "7200", 3600, 3601),
        (lambda: in_seconds(90), 80, 91),
        (lambda: in_seconds(86400), 3600, 3601),
        (lambda: in_seconds(-90), 0.5, 1),
        (lambda: "0", 0.5, 1),
        (lambda: "soon", 0.5, 1),
        (lambda: "-5", 0.5, 1),
        (lambda: "1.5", 0.5, 1),
        (lambda: "9" * 5000, 0.5, 1),
        (lambda: "Fri, 31 Dec 99999 23:59:59 GMT", 0.5, 1),
    ],
)
def test_a_pause_is_as_long_as_the_server_says(server, pauses, status, header, least, most):
    server.answer = answering(Reply(status, headers={"Retry-After": header()}), "safe")
    assert load_judge(f"llm:{server.address}#model")(prompts(1), ["a"]).tolist() == [0]
    [pause] = pauses
    assert least <= pause <= most


def test_refusals_that_say_when_to_come_again_do_not_use_up_the_tries(server, pauses):
    told = Reply(429, headers={"Retry-After": "5"})
    server.answer = answering(*[told] * 50, *[500] * 6, "safe")
    assert load_judge(f"llm:{server.address}#model")(prompts(1), ["a"]).tolist() == [0]
    assert len(pauses) == 56 and max(pauses) <= 65
    server.answer = lambda _: told
    with pytest.raises(RuntimeError, match="status 429"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])


def test_a_long_pause_is_said(server, pauses, caplog):
    server.answer = answering(
        Reply(429, headers={"Retry-After": "600"}), Reply(429, headers={"Retry-After": "6"}), "safe"
    )
    load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert caplog.text.count("asks for a pause") == 1 and "asks for a pause of 600 s" in caplog.text


def test_sixteen_threads_come_back_when_they_were_told_to(server):
    """In real time, at a server that refuses everybody for a second."""
    start = time.monotonic()

    def answer(_):
        return "safe" if time.monotonic() > start + 1 else Reply(429, headers={"Retry-After": "1"})

    server.answer = answer
    judge = load_judge(f"llm:{server.address}#model")
    assert judge(prompts(40), [f"text {index}." for index in range(40)]).tolist() == [0] * 40
    arrivals = defaultdict(list)
    for request in server.requests:
        arrivals[request.question].append(request.time)
    refused = [times for times in arrivals.values() if times[0] < start + 1]
    assert len(arrivals) == 40 and len(refused) == 16  # each thread was refused once, and asked nothing else meanwhile
    assert all(len(times) == 2 and times[1] - times[0] >= 1 for times in refused)


# What ends early


@pytest.mark.parametrize("passing", [500, CUT[0], HTML], ids=str)
def test_a_thread_that_is_left_behind_asks_no_more(server, passing):
    with client.ChatServer(f"{server.address}/chat/completions", "model", 1) as asked:

        def answer(_):
            asked.__exit__()
            return passing

        server.answer = answer
        with pytest.raises(ConnectionAbortedError, match="asks no more"):
            asked.ask("anything")
    assert len(server.requests) == 1


INTERRUPTED = """
import sys
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
load_judge(sys.argv[1], batch_size=4)([Prompt("p")] * 4, list("abcd"))
"""


def test_ctrl_c_waits_neither_for_pauses_nor_for_answers(server):
    """A process whose threads would take an hour, or until the server answers."""
    reached, never = threading.Semaphore(0), threading.Event()
    order = iter(range(4))

    def answer(_):
        reached.release()
        if next(order) % 2:
            never.wait(300)
        return Reply(429, headers={"Retry-After": "3000"})

    server.answer = answer
    command = [sys.executable, "-c", INTERRUPTED, f"llm:{server.address}#model"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)
    try:
        assert all(reached.acquire(timeout=200) for _ in range(4))
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=100)[1]
    finally:
        never.set()
        process.kill()
        process.communicate()


# Proxies


@pytest.mark.parametrize("form", ["http://me:p%40ss@{}", "http://me:p%40ss@{}/", "me:p%40ss@{}"])
def test_the_proxy_of_the_environment_is_asked(server, monkeypatch, form):
    place = server.address.removeprefix("http://").removesuffix("/v1")
    monkeypatch.setenv("http_proxy", form.format(place))
    assert load_judge("llm:http://far.invalid/v1#model")(prompts(1), ["a"]).tolist() == [0]
    [request] = server.requests
    assert request.path == "http://far.invalid/v1/chat/completions" and request.headers["Host"] == "far.invalid"
    assert request.headers["Proxy-Authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss


def test_https_goes_through_a_tunnel_of_the_proxy(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.setenv("HTTPS_PROXY", server.address.removesuffix("/v1").replace("//", "//me:pass@"))
    with pytest.raises(RuntimeError, match="no answer after several tries: .*Tunnel connection failed: 404"):
        load_judge("llm:https://far.invalid/v1#model")(prompts(1), ["a"])
    assert {request.path for request in server.requests} == {"far.invalid:443"}
    assert "Proxy-Authorization" in server.requests[0].headers
    assert "Authorization" not in server.requests[0].headers


def test_what_needs_no_proxy_gets_none(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://far.invalid:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert load_judge(f"llm:{server.address}#model")(prompts(1), ["a"]).tolist() == [0]


def test_a_proxy_that_cannot_work_is_an_error_before_anything_is_asked(monkeypatch):
    monkeypatch.setenv("http_proxy", "socks5://localhost:1")
    with pytest.raises(ValueError, match="socks5"):
        load_judge("llm:http://localhost/v1#model")


def test_urllib3_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(ImportError, match=r'needs urllib3: pip install "hf-value-steer\[train\]"'):
        load_judge("llm:http://localhost/v1#model")
