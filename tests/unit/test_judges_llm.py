"""Judges behind a server: what is asked, how answers are read, and which failures are tried again."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hf_value_steer.training.judges import llm, load_judge
from hf_value_steer.training.prompts import Prompt
from tests.unit.test_judges import prompts


@dataclass
class Server:
    """A chat-completions server that answers as `answer` says: a text, or a status; it keeps what it was asked."""

    address: str = ""
    answer: Callable[[str], str | int | None] = lambda _: "safe"
    raw: bytes | None = None
    bodies: list[dict] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def reply(self, path, body, key):
        self.bodies.append(body)
        self.keys.append(key)
        answer = self.answer(body["messages"][0]["content"]) if path == "/v1/chat/completions" else 404
        if isinstance(answer, int):
            return answer, b'{"error": "planted"}'
        return 200, self.raw or json.dumps({"choices": [{"message": {"content": answer}}]}).encode()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = state.reply(self.path, body, self.headers["Authorization"])
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def do_GET(self):
            state.keys.append(self.headers["Authorization"])
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(llm, "_FIRST_WAIT", 1e-3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.address = f"http://127.0.0.1:{listening.server_port}/v1"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


def answering(*answers):
    """Answers in turn, whatever the question."""
    turns = iter(answers)
    return lambda _: next(turns)


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
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    judge = load_judge(f"llm:{server.address}/#org/model")
    judge([Prompt("ask {response} {x}")], ['say {prompt} "ü"'])
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("org/model", 0, 64)
    [message] = body["messages"]
    assert message["role"] == "user"
    assert "ask {response} {x}\n" in message["content"] and 'say {prompt} "ü"\n' in message["content"]
    assert server.keys == ["Bearer a key"]


@pytest.mark.parametrize(
    ("header", "unreadable"), [("", 1), ("polarity: undesirable\n", 1), ("polarity: desirable\n", 0)]
)
def test_a_template_of_one_s_own(server, tmp_path, header, unreadable):
    path = tmp_path / "numbers.txt"
    path.write_text(f'{header}Does "{{response}}" mention a number? Answer yes or no. {{"json": 1}}\n')
    server.answer = lambda question: {"a": "Yes.", "b": "no", "c": "8", "d": "maybe"}[question.split('"')[1]]
    judge = load_judge(f"llm:{server.address}#model#{path}")
    assert judge(prompts(4), list("abcd")) == pytest.approx([1, 0, 0.8, unreadable]) and judge.unparseable == 1
    asked = sorted(body["messages"][0]["content"] for body in server.bodies)
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


def test_what_may_pass_is_tried_again(server):
    server.answer = answering(500, 429, 503, "safe", 502, "unsafe")
    judge = load_judge(f"llm:{server.address}#model", batch_size=1)
    assert judge(prompts(2), ["a", "b"]).tolist() == [0, 1]
    assert len(server.bodies) == 6 and judge.unparseable == 0


@pytest.mark.parametrize("status", [500, 429])
def test_what_does_not_pass_is_an_error(server, status):
    server.answer = lambda _: status
    with pytest.raises(RuntimeError, match=f"no answer after 7 tries: .* answered with status {status}: .*planted"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert len(server.bodies) == 7


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_an_error_at_once(server, status):
    server.answer = lambda _: status
    with pytest.raises(RuntimeError, match=f"answered with status {status}: .*planted"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert len(server.bodies) == 1


def test_the_key_does_not_follow_a_redirect(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    server.answer = lambda _: 302
    with pytest.raises(RuntimeError, match="answered with status 404"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])
    assert server.keys == ["Bearer a key", None]


@pytest.mark.parametrize("raw", [b"<html>", b"{}", b'{"choices": []}', b"[1]"])
def test_a_server_of_another_kind_is_an_error(server, raw):
    server.raw = raw
    with pytest.raises(RuntimeError, match="sent no chat completion"):
        load_judge(f"llm:{server.address}#model")(prompts(1), ["a"])


def test_no_server_is_an_error(monkeypatch):
    monkeypatch.setattr(llm, "_FIRST_WAIT", 1e-3)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as unheard:
        port = unheard.server_port
    with pytest.raises(RuntimeError, match="no answer after 7 tries: .*Connection refused"):
        load_judge(f"llm:http://127.0.0.1:{port}/v1#model")(prompts(1), ["a"])
