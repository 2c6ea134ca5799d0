"""A chat-completions server on this machine that answers as a test tells it to, and remembers what it was asked."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass
class Reply:
    """What goes over the wire; `cut` loses the end of it, in one of the ways in which connections break."""

    status: int = 200
    body: bytes = b'{"error": "planted"}'
    headers: dict[str, str] = field(default_factory=dict)
    cut: Literal["length", "chunked", "silence"] | None = None

    def __str__(self) -> str:
        """For the name of a test."""
        return self.cut or f"{self.status} {self.body[:6].decode()}"


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@dataclass
class Request:
    """What was asked, and when (`time.monotonic`)."""

    path: str
    headers: Message
    body: dict | None
    time: float

    @property
    def question(self) -> str:
        return self.body["messages"][0]["content"]


@dataclass
class ChatServer:
    """A server that answers a question as `answer` says: a text, a status, or a whole reply."""

    address: str = ""
    answer: Callable[[str], str | int | Reply | None] = lambda _: "safe"
    requests: list[Request] = field(default_factory=list)

    def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        if request.body is None or not request.path.endswith("/v1/chat/completions"):
            return Reply(404)
        answer = self.answer(request.question)
        if isinstance(answer, Reply):
            return answer
        return Reply(answer) if isinstance(answer, int) else Reply(body=completion(answer))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet
    state: ChatServer

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def do_GET(self):
        self._answer(None)

    do_CONNECT = do_GET

    def _answer(self, body):
        reply = self.state.reply(Request(self.path, self.headers, body, time.monotonic()))
        if reply.cut == "silence":
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.cut == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if reply.cut is None:
            self.wfile.write(reply.body)
            return
        half = reply.body[: len(reply.body) // 2]
        self.wfile.write(b"%x\r\n%s\r\n" % (len(half), half) if reply.cut == "chunked" else half)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


class _Listening(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True
    block_on_close = False  # connections are kept open by the client

    def handle_error(self, *_):
        """A client that is gone is nothing to report: tests look at what arrived."""


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    state = ChatServer()
    with _Listening(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state})) as listening:
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
