"""Generating under one setting: base, filter, placebo, baselines, by the same loop on the same prompts and seeds."""

import copy
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.configuration.filter import ValueFilterConfig
from hf_value_steer.configuration.operating_point import PLAIN
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.writing import claim, write_json
from hf_value_steer.generation.decoding import value_steer_generate
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.policy import undesirability
from hf_value_steer.progress import progress
from hf_value_steer.training.continuation import until_end
from hf_value_steer.training.prompts import Formatter, prompts_digest
from hf_value_steer.training.sampling import generate_arguments


_DONE_BY = {"watch": "values of base"}  # what bars say of a method whose name says little
PLACEBO_PROMPTS = 32  # on which a placebo's threshold is found


@dataclass
class Texts:
    """What one run generated; one entry a row, the rows of a prompt together.

    Args:
        ids: token ids of each row, up to and including its end.
        interventions: tokens that are not the natural sample.
        values: value of each token, where they were watched.
        prompt_values: value of each prompt, where it was watched.
        seconds: time of generation.
    """

    ids: list[list[int]] = field(default_factory=list)
    interventions: list[int] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    prompt_values: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """The rows of all parts."""
        lists = ("ids", "interventions", "values", "prompt_values")
        rows = {name: [row for part in parts for row in getattr(part, name)] for name in lists}
        return cls(**rows, seconds=sum(part.seconds for part in parts))


@dataclass
class Setting:
    """One run: its name, which method it is, and what `generate` is given for it."""

    name: str
    method: str
    value_steer: ValueFilterConfig | None = None
    num_candidates: int | None = None
    threshold: float | None = None
    alpha: float | None = None
    system_prompt: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Runner:
    """Runs settings on the same prompts, and remembers what they generated under each.

    Args:
        model, formatter: backbone, and how prompts become its input.
        prompts: to continue, `samples` times each.
        sampling (`dict`): arguments of `generate` that say how tokens are drawn.
        folder: where each run is kept; a run that is there is not made again.
        conditions (`dict`): what else has to be the same, and is not said by the settings.

    Raises:
        ValueError: if the folder holds runs that were made under other conditions.
    """

    model: PreTrainedModel
    formatter: Formatter
    prompts: Sequence[Prompt]
    sampling: dict[str, Any]
    _: KW_ONLY
    samples: int
    max_new_tokens: int
    batch_size: int
    seed: int
    folder: Path
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ("samples", "max_new_tokens", "batch_size", "seed", "sampling")
        of = {
            "prompts": prompts_digest(self.prompts),
            "backbone": fingerprint(self.model),
            "chat": self.formatter.chat,
        }
        claim(self.folder / "runs.json", {**of, **{name: getattr(self, name) for name in names}, **self.conditions})

    def run(self, setting: Setting, samples: int | None = None) -> Texts:
        """Generate under `setting`, or read what was generated before."""
        samples = samples or self.samples
        path = self.folder / f"{_slug(setting.name)}-{_digest(setting, samples)}.json"
        if path.exists():
            return Texts(**read_record(path, *(each.name for each in fields(Texts))))
        texts = Texts()
        for first in progress(
            range(0, len(self.prompts), self.batch_size), _DONE_BY.get(setting.method, setting.name), "batch"
        ):
            self._batch(setting, first, samples, texts)
        write_json(path, asdict(texts))
        return texts

    def generate(self, setting: Setting, prompts: Sequence[Prompt], samples: int, seed: int) -> Any:
        """One call of `generate`: its output, and the length of the prompts in it."""
        formatter = self.formatter
        if setting.system_prompt:
            formatter = Formatter(formatter.tokenizer, formatter.chat, setting.system_prompt)
        inputs = formatter(prompts, self.model.device)
        steer = {
            "custom_generate": value_steer_generate,
            "value_steer": setting.value_steer,
            "text_tokenizer": formatter.tokenizer,
        }
        torch.manual_seed(seed)
        output = self.model.generate(
            **inputs,
            **generate_arguments(self.sampling),
            **setting.options,
            **(steer if setting.value_steer else {}),
            num_return_sequences=samples,
            max_new_tokens=self.max_new_tokens,
            return_dict_in_generate=True,
        )
        return output, inputs["input_ids"].shape[1]

    def batch(self, setting: Setting, first: int, samples: int) -> tuple[Any, int]:
        """Generate for the batch whose first prompt has this number; the same each time. Returns as [`generate`]."""
        prompts = self.prompts[first : first + self.batch_size]
        output, length = self.generate(setting, prompts, samples, self.seed + first)
        return output, int(length)

    def _batch(self, setting: Setting, first: int, samples: int, texts: Texts) -> None:
        start = time.perf_counter()
        output, length = self.batch(setting, first, samples)
        texts.seconds += time.perf_counter() - start
        new = output.sequences[:, length:].cpu()
        counts = until_end(new, self.model.generation_config.eos_token_id).sum(dim=1).tolist()
        texts.ids += [row[:count] for row, count in zip(new.tolist(), counts, strict=True)]
        if setting.value_steer is None:
            texts.interventions += [0] * len(new)
            return
        texts.interventions += output.interventions.sum(dim=1).tolist()
        texts.values += [row[:count] for row, count in zip(output.token_values.tolist(), counts, strict=True)]
        if output.prompt_values is not None:  # a judge of text has none
            texts.prompt_values += output.prompt_values.tolist()


def _digest(*what: Any) -> str:
    """A few digits that differ where texts may: two runs of one name under different settings are two."""
    return hashlib.sha256(json.dumps(_identity(list(what)), sort_keys=True).encode()).hexdigest()[:8]


def _identity(value: Any) -> Any:
    """What tells a setting, or a part of it, from another, as JSON; heads and judges by what they are made of."""
    if isinstance(value, ValueHead):
        return [value.fingerprint(), value.config.threshold, value.config.operating_point]
    if hasattr(value, "fingerprint"):
        return value.fingerprint()
    if is_dataclass(value):
        return {each.name: _identity(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): _identity(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _slug(name: str) -> str:
    """A name as that of a file; signs stay, so that m=-0.5 and m=0.5 are two runs."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")


def watch(head: ValueHead) -> Setting:
    """The base run once more with its values recorded: K=1 never intervenes."""
    return Setting("watch", "watch", ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=1, **PLAIN))


def value_filter(head: ValueHead, threshold: float, num_candidates: int, named: bool) -> Setting:
    """The filter as the head has it, at a threshold and a K; `named` puts the threshold into its name."""
    config = ValueFilterConfig(value_head=head, threshold=threshold, num_candidates=num_candidates)
    used = config.settled(head.config.operating_point)
    back = f" rollback={used.rollback}" if used.rollback else ""
    soft = f" {used.selection}" if used.selection != "first" else ""
    name = f"filter K={num_candidates}{back}{soft}" + (f" c={threshold:.6g}" if named else "")
    return Setting(name, "filter", config, num_candidates, threshold)


def args_reranking(head: ValueHead, num_candidates: int) -> Setting:
    """ARGS (arXiv 2402.01694): every step commits the best of value and probability; no threshold is ever met."""
    never = 1e-6 if head.config.polarity == "undesirable" else 1 - 1e-6
    config = ValueFilterConfig(
        value_head=head, threshold=never, num_candidates=num_candidates, fallback="args", evaluation="eager", **PLAIN
    )
    return Setting(f"ARGS K={num_candidates}", "args", config, num_candidates)


def shuffled(head: ValueHead, seed: int) -> ValueHead:
    """The placebo: the entries of each weight tensor in another order."""
    placebo, generator = copy.deepcopy(head), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in placebo.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return placebo


def placebo(runner: Runner, head: ValueHead, num_candidates: int, rate: float, name: str = "placebo") -> Setting:
    """A head that knows nothing, with a threshold that intervenes at this rate, found on the first few prompts."""
    path = runner.folder / f"{_slug(name)}-threshold-{_digest(head, num_candidates, rate)}.json"
    if not path.exists():
        write_json(path, _placebo_threshold(runner, head, num_candidates, rate))
    threshold = read_record(path, kind=float)
    config = ValueFilterConfig(value_head=head, threshold=threshold, num_candidates=num_candidates)
    return Setting(name, "placebo", config, num_candidates, threshold)


def _placebo_threshold(runner: Runner, head: ValueHead, num_candidates: int, rate: float) -> float:
    polarity = head.config.polarity
    prompts = runner.prompts[:PLACEBO_PROMPTS]

    def generate(threshold: float, candidates: int) -> Any:
        how = PLAIN if candidates == 1 else {}
        config = ValueFilterConfig(value_head=head, threshold=threshold, num_candidates=candidates, **how)
        return runner.generate(Setting("", "placebo", config), prompts, 1, runner.seed)[0]

    values = generate(0.5, 1).token_values
    values = values[~values.isnan()]
    worst = undesirability(values, polarity).sort(descending=True).values
    ranks = [min(int(factor * rate * len(worst)), len(worst) - 1) for factor in (1, 1.5, 2, 3)]
    at: list[float] = worst[ranks].clamp(1e-6, 1 - 1e-6).tolist()  # a placebo may say 0 or 1, which no threshold is
    thresholds = at if polarity == "undesirable" else [1 - each for each in at]
    tried = progress(thresholds, "threshold of the placebo", "try")
    rates = [generate(each, num_candidates).interventions.float().mean().item() for each in tried]
    return min(zip(rates, thresholds, strict=True), key=lambda pair: abs(pair[0] - rate))[1]


def best_of(runner: Runner, head: ValueHead, count: int) -> Texts:
    """Best-of-N: of N samples for each row the one whose worst value is best."""
    samples = runner.run(Setting(f"watch best of {count}", "watch", watch(head).value_steer), runner.samples * count)
    worst = torch.tensor([worst_value(values, head) for values in samples.values]).view(-1, count)
    chosen = (worst.argmin(dim=1) + torch.arange(len(worst)) * count).tolist()
    return Texts([samples.ids[row] for row in chosen], [0] * len(chosen), seconds=samples.seconds)


def worst_value(values: Sequence[float], head: ValueHead) -> float:
    """The highest undesirability among a row's values."""
    return float(undesirability(torch.tensor(values), head.config.polarity).max())
