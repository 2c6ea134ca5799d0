"""`hf-value-steer serve`: vLLM's OpenAI-compatible server, steered."""

import argparse
import json
import sys
from importlib.util import find_spec
from typing import Any


def add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "serve a steered model over HTTP, with vLLM"
    parser = commands.add_parser(
        "serve",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. All other arguments go to vLLM: --port, --dtype, ...",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a causal language model")
    parser.add_argument("--value-head", metavar="HEAD", help="Hub id or folder of a value head")
    parser.add_argument("--method", choices=["filter", "abstain"], default="filter", help="default: filter")
    parser.add_argument("--threshold", type=float, help="in (0, 1); default: that of the head")
    parser.add_argument("--alpha", type=float, help="instead: what the head's calibration is to promise")
    parser.add_argument("--num-candidates", type=int, metavar="K", help="of the filter; default: 8")
    parser.add_argument(
        "--value-steer", metavar="JSON", type=json.loads, help="instead of all these: a configuration, or a list"
    )
    parser.set_defaults(run=_serve, others=[])


def _serve(arguments: argparse.Namespace) -> int:
    if find_spec("vllm") is None:
        print('hf-value-steer serve: vLLM is not installed: pip install "hf-value-steer[vllm]"', file=sys.stderr)
        return 2
    try:
        from hf_value_steer.vllm.server import serve

        serve(arguments.model, _value_steer(arguments), arguments.others)
    except (ImportError, OSError, ValueError) as error:
        print(f"hf-value-steer serve: {error}", file=sys.stderr)
        return 2
    return 0


def _value_steer(arguments: argparse.Namespace) -> Any:
    """The configuration that the options spell."""
    names = ("value_head", "threshold", "alpha", "num_candidates")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.value_steer is None:
        return {"method": arguments.method, **given}
    if given:
        raise ValueError(f"--value-steer says it all: leave out {', '.join(given)}.")
    return arguments.value_steer
