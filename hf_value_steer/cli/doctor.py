"""`hf-value-steer doctor`: is steering exact on this model and this machine?"""

import argparse
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_value_steer.doctor import Check, diagnose


def add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "check that steering is exact on a model and this machine"
    parser = commands.add_parser("doctor", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="Hub id or folder of a causal language model")
    parser.add_argument("--vllm", action="store_true", help="check the installed vLLM instead of a model")
    parser.add_argument("--value-head", metavar="HEAD", help="Hub id or folder of a value head")
    parser.add_argument("--num-candidates", type=int, default=8, metavar="K", help="default: 8")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="default: that of the checkpoint",
    )
    parser.add_argument("--device", help='a `device_map`, such as "cuda:0" or "auto"; default: cuda if there is one')
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.vllm == (arguments.model is not None):
        print("hf-value-steer doctor: pass a MODEL, or --vllm", file=sys.stderr)
        return 2
    return _examine_vllm(arguments.json) if arguments.vllm else _examine_model(arguments)


def _examine_vllm(as_json: bool) -> int:
    try:
        from hf_value_steer.vllm.compatibility import check_vllm
    except ImportError as error:
        print(f"hf-value-steer doctor: {error}", file=sys.stderr)
        return 2
    checks = check_vllm()
    print(json.dumps({"checks": [_json(check) for check in checks]}) if as_json else _table(checks))
    return int(any(check.status == "FAIL" for check in checks))


def _examine_model(arguments: argparse.Namespace) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, device_map=device)
    except (OSError, ValueError) as error:
        print(f"hf-value-steer doctor: cannot load {arguments.model}: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    checks = diagnose(model, arguments.value_head, arguments.num_candidates)
    seconds = round(time.perf_counter() - start, 1)
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    if arguments.json:
        facts = {"model": arguments.model, "dtype": dtype, "device": device, "seconds": seconds}
        print(json.dumps({**facts, "checks": [_json(check) for check in checks]}))
    else:
        print(f"{_table(checks)}\n\n{arguments.model}, {dtype}, {device}: {seconds} s")
    return int(any(check.status == "FAIL" for check in checks))


def _json(check: Check) -> dict[str, Any]:
    """The check as JSON, which has no NaN."""
    numbers = {name: number if math.isfinite(number) else None for name, number in check.numbers.items()}
    return {**asdict(check), "numbers": numbers}


def _table(checks: Sequence[Check]) -> str:
    """Name, status and detail of each check, the detail wrapped to the terminal."""
    indent = " " * 18
    width = max(shutil.get_terminal_size().columns, 60)
    rows = [("check", "result", "detail"), *((check.name, check.status, check.detail) for check in checks)]
    return "\n".join(
        textwrap.fill(f"{name:<10}{status:<8}{detail}", width, subsequent_indent=indent, break_on_hyphens=False)
        for name, status, detail in rows
    )
