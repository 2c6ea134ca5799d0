"""A chat-completions server: a question, its answer, and what is tried again in between."""

import json
import logging
import os
import random
from threading import Event
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Retry, make_headers
from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError
from urllib3.util import parse_url


logger = logging.getLogger(__name__)

_TRIES, _FREE_TRIES = 7, 50  # free: the server says when to come again
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds, doubled each time: about a minute in all
_LONGEST_TOLD = 3600  # seconds, of a pause that a server asks for
_TIMEOUT = 120.0  # seconds
_WORTH_ANOTHER_TRY = (408, 409, 429, *range(500, 600))


class Pauses(Retry):
    """Pauses between tries: each about twice the last, and begun only when the time of `Retry-After` is over.

    A [`~urllib3.Retry`] of our own, since none of urllib3's pauses can be ended, or leaves a refusal uncounted.

    Up to half of each is left out by chance: threads that were refused together should not come back together. Where
    a server has time for few threads only, each is refused often; so a refusal that says when to come again costs no
    try, up to `_FREE_TRIES` times.

    Args:
        total (`int`): how many tries may follow the first.
        closing (`Event`): when it is set, a pause ends with a `ConnectionAbortedError`.
        options: as in [`~urllib3.Retry`].
    """

    def __init__(self, total: int, *, closing: Event, **options: Any):
        super().__init__(total, **options)
        self.closing = closing

    def new(self, **changes: Any) -> "Pauses":
        return super().new(closing=self.closing, **changes)

    def get_backoff_time(self) -> float:
        longest = min(_FIRST_PAUSE * 2.0 ** (len(self.history) - 1), _LONGEST_PAUSE)
        return longest * random.uniform(0.5, 1.0)

    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        try:
            return super().get_retry_after(response)
        except (HTTPError, ValueError, OverflowError):  # neither a number nor a date that exists
            return None

    def sleep(self, response: BaseHTTPResponse | None = None) -> None:
        told = (response is not None and self.get_retry_after(response)) or 0.0
        if told and len(self.history) <= _FREE_TRIES:
            self.total = int(self.total or 0) + 1
        if told > _LONGEST_PAUSE:
            logger.warning("The server of the judge asks for a pause of %.0f s.", told)
        if self.closing.wait(told + self.get_backoff_time()):
            raise ConnectionAbortedError("The judge asks no more.")


class ChatServer:
    """Asks a model behind an OpenAI-compatible server; for use in a `with` block, by many threads.

    Args:
        url (`str`): of its chat completions.
        model (`str`): name of the model.
        concurrency (`int`): connections that are kept.
    """

    def __init__(self, url: str, model: str, concurrency: int):
        self.url, self.model, self.closing = url, model, Event()
        self.retries = Pauses(
            _TRIES - 1,
            closing=self.closing,
            allowed_methods=None,
            status_forcelist=_WORTH_ANOTHER_TRY,
            raise_on_status=False,
            retry_after_max=_LONGEST_TOLD,
        )
        self.http = _connections(url, maxsize=concurrency, timeout=_TIMEOUT)
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            if not key.isprintable():  # an error of the client would show it
                raise ValueError("OPENAI_API_KEY holds a line break, or another character that no key has.")
            self.headers["Authorization"] = f"Bearer {key}"  # for this server only: redirects are not followed

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections. A thread that is still asking makes no further try."""
        self.closing.set()
        self.http.clear()

    def ask(self, question: str) -> str:
        """The model's answer, greedy, of at most 64 tokens.

        Raises:
            ConnectionError: if there is none after several tries, or no point in another.
        """
        messages = [{"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 64}).encode()
        retries: Retry = self.retries
        while True:
            try:
                reply = self._post(body, retries)
                if (answer := _content(reply.data)) is not None:
                    return answer
                retries = reply.retries or retries
                strange = ResponseError(f"sent no chat completion: {reply.data[:300]!r}")
                retries = retries.increment("POST", self.url, error=strange)
            except MaxRetryError as error:
                raise ConnectionError(f"no answer after several tries: {self.url}: {error.reason}") from error
            retries.sleep(reply)

    def _post(self, body: bytes, retries: Retry) -> BaseHTTPResponse:
        reply = self.http.request(
            "POST", self.url, body=body, headers=self.headers, retries=retries, redirect=False, decode_content=False
        )
        if reply.status != 200:
            tries = f" (try {len(reply.retries.history) + 1})" if reply.retries and reply.retries.history else ""
            said = reply.data[:300].decode(errors="replace")
            raise ConnectionError(f"{self.url} answered with status {reply.status}{tries}: {said}")
        return reply


def _connections(url: str, **options: Any) -> PoolManager:
    """Connections to a server, through the proxy that the environment names for it, as `urllib.request` finds it."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if not proxy or proxy_bypass(parts.netloc):
        return PoolManager(**options)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    auth = unquote(parse_url(proxy).auth or "", encoding="latin-1")  # as which `make_headers` encodes it again
    return ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=auth or None), **options)


def _content(reply: bytes) -> str | None:
    """The text of a chat completion, empty if it says nothing; `None` if it is none."""
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else "" if content is None else None
