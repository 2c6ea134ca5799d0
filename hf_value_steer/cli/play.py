"""`play`: the playground, a page in the browser."""

import os
from importlib.util import find_spec
from pathlib import Path
from threading import Event

from accelerate import PartialState

from hf_value_steer.activation.steering_vectors import SteeringVectors
from hf_value_steer.arguments.steer import PlayArguments
from hf_value_steer.configuration.parse import parse_configs
from hf_value_steer.generation.scorer import bind
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.playground.settings import Settings
from hf_value_steer.playground.writing import Writer
from hf_value_steer.training.collect import load_backbone


def play(arguments: PlayArguments) -> None:
    """Serve the page until the process is told to stop."""
    if find_spec("gradio") is None:
        raise ImportError('The playground needs gradio: pip install ".[play]".')
    parse_configs(arguments.configuration())
    head = ValueHead.from_pretrained(arguments.value_head)
    settings = Settings.at_first(arguments, head)
    bind(settings.valued(head), head, 1, head.device)
    vectors = None if arguments.vectors is None else SteeringVectors.from_pretrained(arguments.vectors)
    model, tokenizer = load_backbone(arguments.model, arguments.dtype, PartialState().device)
    writer = Writer(model, tokenizer, head, vectors)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # is read when gradio is imported
    from hf_value_steer.playground.page import Page

    folder = Path(arguments.model)
    page = Page(writer, settings, folder.name if folder.is_dir() else arguments.model)
    with page.served(arguments.host, arguments.port) as address:
        print(f"The playground is at {address} until you press Ctrl-C.", flush=True)
        Event().wait()
