"""The playground in a browser: steered, changed, refused, stopped, in two tabs; and its pictures for the docs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.smollm2 import backbone_folder
from hf_value_steer import SteeringVectors, ValueFilterConfig
from hf_value_steer.calibration import Calibration
from tests.chromium import EXECUTABLE, chromium
from tests.families import random_head
from tests.tiny_text import continued, save_tiny_model


pytestmark = [
    pytest.mark.skipif(find_spec("gradio") is None, reason='needs gradio: pip install ".[play]"'),
    pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium"),
]
ROOT = Path(__file__).parents[2]
# Where pictures go. `PLAYGROUND_PICTURES=docs/images` renews those of the docs.
PICTURES = os.environ.get("PLAYGROUND_PICTURES")
INVITED = "Write the beginning of a text above, and press Write: the model goes on from there, as it is and steered."
PROMPT, OTHER = "goodak goodbl", "goodbk goodcl goodak"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"> {{1+1}} ${1+1}"
SECTIONS = "[...document.querySelectorAll('#texts article:last-of-type section')]"
PLOTTED = "document.querySelector('#plot canvas, #plot svg')?.checkVisibility()"
# A process that writes down which other machines it wants to talk to.
SERVER = """
import socket, sys
from hf_value_steer.cli import main
looked_up = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    if host not in (None, "127.0.0.1", "localhost", b"127.0.0.1"):
        print("looked up", host, file=sys.stderr, flush=True)
    return looked_up(host, *more, **named)
socket.getaddrinfo = getaddrinfo
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def served(log, model, head, *more):
    """The address of a playground in a process of its own, which Ctrl-C ends; what it says is in `log`."""
    command = [sys.executable, "-c", SERVER, "play", str(model), "--value-head", str(head), *map(str, more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        options = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "cwd": ROOT, "env": environment}
        with subprocess.Popen(command, **options) as process:
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            try:
                assert found, log.read_text()
                yield found[0]
            finally:
                process.send_signal(signal.SIGINT)
                assert process.wait(60) == 130
    said = log.read_text()
    assert said.rstrip().endswith("hf-value-steer play: stopped.")
    assert "Traceback" not in said and "looked up" not in said


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, a head and vectors for it."""
    folder = tmp_path_factory.mktemp("world")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model"))
    head = random_head(model)
    head.calibration = Calibration.from_scores([0.5] * 20, head_fingerprint=head.fingerprint())
    head.save_pretrained(folder / "head")
    directions = torch.eye(model.config.hidden_size)[:2]
    SteeringVectors((0, 1), directions, torch.full((2,), 20.0)).save_pretrained(folder / "vectors")
    return folder


@pytest.fixture(scope="module")
def address(world):
    with served(world / "log", world / "model", world / "head", "--vectors", world / "vectors") as found:
        yield found


@pytest.fixture
def page(address):
    with chromium() as page:
        show(page, address)
        yield page
        ours = urlsplit(address).netloc
        others = [
            each for each in page.requests() if urlsplit(each).scheme != "data" and urlsplit(each).netloc != ours
        ]
        assert not others and page.requests()
        assert not [each for each in page.complaints() if "Vega" not in each]


def show(page, address, **how):
    page.open(address, **how)
    page.wait("document.querySelector('#prompt textarea') && document.querySelector('#top_p input')")


def number(page, name, value):
    page.enter(f"#{name} input[type=number]", str(value))


def ask(page, prompt, tokens=12):
    number(page, "max_new_tokens", tokens)
    page.enter("#prompt textarea", prompt)
    page.click("#write")


def texts(page):
    """Both texts, as they are to be read."""
    return page.evaluate(f"{SECTIONS}.map(each => each.querySelector('.text').innerText)")


def reads(page, base, steered):
    """Wait until these are the two texts."""
    page.wait(f"{SECTIONS}.map(each => each.querySelector('.text').innerText).join('|') == {base + '|' + steered!r}")


def expected(world, prompt=PROMPT, seed=0, **steering):
    """Both texts, by `generate` itself."""
    config = ValueFilterConfig(value_head=str(world / "head"), **{"threshold": 0.5, **steering})
    return [continued(world / "model", prompt, each, seed=seed) for each in (None, config)]


def shut(page):
    """How many tokens there are, once there are no more of them for a second."""
    counts = [-1, 0]
    while counts[-1] != counts[-2]:
        time.sleep(1)
        counts.append(page.evaluate("document.querySelectorAll('#texts .t').length"))
    return counts[-1]


def test_a_text_is_steered(page, world):
    ask(page, PROMPT)
    reads(page, *expected(world))
    replaced = page.evaluate("document.querySelectorAll('#texts .swap').length")
    assert replaced and f"{replaced} replaced" in page.text("#texts section:last-of-type h3")
    page.wait(PLOTTED)
    assert page.visible("#texts .legend")
    assert not page.visible("#texts .tip")
    page.hover("#texts section:last-of-type .swap")
    assert (
        page.visible("#texts .tip") == 1 and page.visible("#texts .chip.yes") == 1 and page.visible("#texts .chip.no")
    )
    assert "a high value is bad" in page.text(".top") and page.visible(".top .swap") == 1


def test_a_slider_changes_it(page, world):
    plain = expected(world)
    for name, value, steered in (
        ("threshold", 0.6, expected(world, threshold=0.6)[1]),
        ("threshold", 0.9999, plain[0]),
        ("threshold", 0.5, plain[1]),
        ("num_candidates", 1, plain[0]),
    ):
        number(page, name, value)
        ask(page, PROMPT)
        reads(page, plain[0], steered)
    number(page, "multiplier", 2)
    ask(page, PROMPT)
    page.wait(f"{SECTIONS}[1].querySelector('.text').innerText != {plain[0]!r}")
    assert shut(page) == 24 and texts(page)[0] == plain[0]
    assert page.evaluate("document.querySelectorAll('#layers').length") == 1


def test_what_was_taken_back_is_shown(page, world):
    for name, value in (("threshold", 0.4), ("num_candidates", 3), ("rollback", 4)):
        number(page, name, value)
    ask(page, PROMPT)
    reads(page, *expected(world, threshold=0.4, num_candidates=3, rollback=4))
    page.wait("document.querySelector('#texts section:last-of-type h3').innerText.includes('taken back')")
    shut(page)
    marked = page.evaluate("document.querySelectorAll('#texts .t.back').length")
    struck = page.evaluate("document.querySelectorAll('#texts .struck s').length")
    assert 0 < marked <= struck and f"{struck} taken back" in page.text("#texts section:last-of-type h3")
    assert "taken back" not in page.text("#texts section h3") and not page.visible("#texts s")
    page.hover("#texts .t.back")
    assert page.visible("#texts .struck") == 1 and page.visible("#texts s")


def test_an_error_is_shown_as_one(page, world):
    ask(page, PROMPT)
    reads(page, *expected(world))
    ask(page, "  ")
    page.wait("document.querySelector('.toast-body.error')")
    assert "There is no prompt: write a text to continue" in page.text(".toast-body.error")
    assert texts(page) == list(expected(world)) and page.visible("#plot")  # what was there before
    ask(page, PROMPT)
    reads(page, *expected(world))


def test_a_second_tab_gets_its_own_text(page, address, world):
    first = page.session
    page.new_tab()
    second = page.session
    show(page, address)
    for session, prompt, seed in ((first, PROMPT, 3), (second, OTHER, 4)):
        page.session = session
        number(page, "seed", seed)
        ask(page, prompt)
    for session, prompt, seed in ((first, PROMPT, 3), (second, OTHER, 4)):
        page.session = session
        reads(page, *expected(world, prompt, seed))
        assert page.text("#texts .prompt") == prompt


def test_who_waits_sees_it_and_can_leave(page, address):
    first = page.session
    page.new_tab()
    show(page, address)  # now: while the first text is written there may be no time for it
    second, page.session = page.session, first
    number(page, "threshold", 0.9999)
    ask(page, PROMPT, 512)
    page.wait("document.querySelectorAll('#texts .t').length > 2")
    page.session = second
    ask(page, OTHER)
    page.wait("document.querySelector('#texts').innerText.includes('queue: 1/1')")
    page.click("#stop")
    page.wait(f"document.querySelector('#texts').innerText.trim() == {json.dumps(INVITED)}")
    time.sleep(1)  # nothing is said of it later
    assert page.text("#texts").strip() == INVITED
    page.session = first
    page.click("#stop")
    assert 2 < shut(page) < 1024
    page.session = second
    assert page.text("#texts").strip() == INVITED


def test_a_text_can_be_stopped_and_cleared(page, world):
    number(page, "threshold", 0.9999)
    ask(page, PROMPT, 512)
    page.wait("document.querySelectorAll('#texts .t').length > 2")
    page.click("#stop")
    assert 2 < shut(page) < 1024
    page.click("#clear")
    page.wait("!document.querySelector('#texts .t')")
    number(page, "threshold", 0.5)
    ask(page, PROMPT)
    reads(page, *expected(world))


def test_a_promise_that_nobody_can_give(page):
    """Of twenty texts one in a hundred cannot be promised."""
    page.click("#promised label:last-of-type")
    page.wait("document.querySelector('#alpha input')")
    number(page, "alpha", 0.01)
    ask(page, PROMPT)
    page.wait("document.querySelector('.toast-body.error')")
    assert "`alpha`=0.01 has no finite threshold" in page.text(".toast-body.error")


def test_a_text_is_no_markup(page):
    ask(page, HOSTILE)
    page.wait("document.querySelector('#texts .t')")
    assert page.text("#texts .prompt") == HOSTILE and not page.visible("#texts img")
    assert page.evaluate("document.title") == "hf-value-steer"


def test_pictures_for_the_docs(tmp_path):
    """The small model with its head for sentiment, as docs/playground.md starts it."""
    folder = tmp_path if PICTURES is None else Path(PICTURES)
    head = ROOT / "model_cards" / "smollm2-135m-sentiment"
    with served(tmp_path / "log", backbone_folder(), head, "--dtype", "float32") as address, chromium() as page:
        for name, how in (("light", {}), ("dark", {"dark": True}), ("phone", {"width": 400})):
            show(page, address, **how)
            ask(page, "The hotel was not", 28)
            page.wait(f"{SECTIONS}[1]?.querySelectorAll('.t').length == 28")
            page.wait(PLOTTED)
            shut(page)
            page.evaluate("[...document.querySelectorAll('#texts .swap')].at(-1).setAttribute('data-last', '')")
            page.tap("[data-last]") if "width" in how else page.hover("[data-last]")
            page.wait("document.getAnimations().every(each => each.playState == 'finished')")
            page.picture(folder / f"playground-{name}.png")
            assert (folder / f"playground-{name}.png").stat().st_size > 20_000
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0
