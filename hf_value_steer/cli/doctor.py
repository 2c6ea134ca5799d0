"""`doctor`: is steering exact on this model and this machine?"""

import json
import math
import shutil
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_value_steer.arguments.doctor import DoctorArguments
from hf_value_steer.doctor import Check, diagnose


def doctor(arguments: DoctorArguments) -> int:
    """Run the checks and print them; the exit status is 1 if one failed."""
    return _examine_vllm(arguments.json) if arguments.model is None else _examine_model(arguments, arguments.model)


def _examine_vllm(as_json: bool) -> int:
    from hf_value_steer.vllm.compatibility import check_vllm

    checks = check_vllm()
    print(json.dumps({"checks": [_json(check) for check in checks]}) if as_json else _table(checks))
    return int(any(check.status == "FAIL" for check in checks))


def _examine_model(arguments: DoctorArguments, name: str) -> int:
    transformers.logging.disable_progress_bar()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, device_map=device)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load {name}: {error}") from error
    start = time.perf_counter()
    checks = diagnose(model, arguments.value_head, arguments.num_candidates)
    seconds = round(time.perf_counter() - start, 1)
    dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
    if arguments.json:
        facts = {"model": name, "dtype": dtype, "device": device, "seconds": seconds}
        print(json.dumps({**facts, "checks": [_json(check) for check in checks]}))
    else:
        print(f"{_table(checks)}\n\n{name}, {dtype}, {device}: {seconds} s")
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
        textwrap.fill(f"{name:<12}{status:<8}{detail}", width, subsequent_indent=indent, break_on_hyphens=False)
        for name, status, detail in rows
    )
