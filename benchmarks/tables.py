"""Write the tables and pages of docs/ from the result files: `python -m benchmarks.tables`."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.head_tables import (
    abstention,
    efficacy,
    going_back,
    operating_point,
    promises,
    steering_heads,
    trade_off,
    tried,
)
from benchmarks.markdown import JUDGES, RESULTS, ROOT, percent, row, span
from hf_value_steer.evaluation.report import render_report
from hf_value_steer.evaluation.sweep import sweep_page


def ratio(case: dict[str, Any]) -> str:
    """Median and range of a case, and the share of interventions that there really was."""
    measured = f"{case['ratio_median']:.2f} [{min(case['ratios']):.2f}, {max(case['ratios']):.2f}]"
    return measured + (f" at {percent(case['intervention_rate'])}" if case["rate"] else "")


def overhead(documents: list[dict[str, Any]]) -> str:
    dtypes = [document["dtype"] for document in documents]
    lines = [row("time, relative to plain `generate` unless said otherwise", *dtypes)]
    lines.append(row(*["---"] * (1 + len(documents))))
    for cases in zip(*(document["cases"] for document in documents), strict=True):
        lines.append(row(cases[0]["name"], *map(ratio, cases)))
    memory = [f"{document['memory']['ratio']:.2f}" for document in documents]
    lines.append(row(f"peak memory, eager K=8, {documents[0]['memory']['prompt']:,}-token prompt", *memory))
    first = documents[0]
    machine, versions, pairs = first["machine"], first["versions"], len(first["cases"][0]["ratios"])
    lines.append("")
    lines.append(
        "SmolLM2-135M, prompts of 64 tokens where the row says nothing, medians [range] of "
        f"{pairs} pairs that take turns token by token, {machine['threads']} threads, {machine['device']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}. "
        f"`{first['command']}`, {first['date']}."
    )
    return "\n".join(lines)


def depth(document: dict[str, Any]) -> str:
    """Cost of heads on layers, a column for each dtype and batch size."""
    panels = document["panels"]
    lines = [row("time, relative to plain `generate`", *(panel["title"] for panel in panels))]
    lines.append(row(*["---"] * (1 + len(panels))))
    for cases in zip(*(panel["cases"] for panel in panels), strict=True):
        lines.append(row(cases[0]["name"], *(ratio({**case, "rate": 0}) for case in cases)))
    for cases in zip(*(panel["cases"] for panel in panels), strict=True):
        if "look" in cases[0]:
            where = cases[0]["name"].split(",")[1].strip()
            costs = [f"{case['look']['cost']:.3f} ({case['look']['steps']} steps)" for case in cases]
            lines.append(row(f"a look at alternatives, {where}", *costs))
    shares = [f"{panel['interventions_at_layer_11']:.2f}" for panel in panels]
    lines.append(row("looks at layer 11, of what they cost at the final state", *shares))
    versions, rounds = document["versions"], len(panels[0]["cases"][0]["ratios"])
    lines.append("")
    lines.append(
        f"SmolLM2-135M, 30 layers, K = {document['candidates']}, prompts of 64 tokens, medians [range] of {rounds} "
        f"rounds in which all runs of a column take turns token by token, {document['machine']['threads']} threads, "
        f"{document['machine']['device']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"`{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def rollback(document: dict[str, Any]) -> str:
    """Cost of going back, a column for each dtype and batch size."""
    panels, back = document["panels"], max(each["rollback"] for each in document["lags"])
    lines = [row("time, relative to plain `generate`", *(panel["title"] for panel in panels))]
    lines.append(row(*["---"] * (1 + len(panels))))
    columns = list(zip(*(panel["cases"] for panel in panels), strict=True))
    lines += [row(cases[0]["name"], *(ratio({**case, "rate": 0}) for case in cases)) for cases in columns]
    for cases in columns:
        if cases[0]["back"]:
            ratios = (ratio({**case["to_rollback_0"], "rate": 0}) for case in cases)
            lines.append(row(f"{cases[0]['name']}, relative to rollback=0", *ratios))
    happened = [panel["cases"][-1]["happened"][-1] for panel in panels]
    counts = (f"{each['interventions']}, {each['tokens_taken_back']}" for each in happened)
    lines.append(row("interventions and tokens taken back in the last row's text", *counts))
    lags = (f"{each['tokens']} tokens, {each['milliseconds']:.0f} ms" for each in document["lags"] if each["rollback"])
    lines.append(row(f"a streamer is behind, rollback={back}", *lags))
    lines += ["", *memory(document["memory"]), "", f"`{document['command']}`, {document['date']}."]
    return "\n".join(lines)


def memory(models: list[dict[str, Any]]) -> list[str]:
    """What going back keeps in memory, in MB."""
    first = models[0]
    kinds = {"history": "the last steps", "recurrent_states": "recurrent states", "window_slots": "window slots"}
    title = f"MB kept by rollback={first['rollback']} (without), batch {first['batch']}"
    lines = [row(title, *kinds.values()), row(*["---"] * (1 + len(kinds)))]
    for model in models:
        sizes = (f"{model['with'][kind] / 1e6:.1f} ({model['without'][kind] / 1e6:.1f})" for kind in kinds)
        lines.append(row(model["model"], *sizes))
    return lines


def activation(document: dict[str, Any]) -> str:
    """Rates and perplexity under vectors of every multiplier, mode and gate."""
    names = list(document["runs"][0]["judges"])
    lines = [row("", *(JUDGES[name] for name in names), "perplexity", "distinct pairs", "steered steps")]
    lines.append(row(*["---"] * (len(names) + 4)))
    for run in document["runs"]:
        base = run["method"] == "base"
        rates = [
            percent(judge["rate"]) + ("" if base else f", {span(judge['difference_interval'])}")
            for judge in (run["judges"][name] for name in names)
        ]
        perplexity = f"{run['perplexity']:.1f}" if base else f"x{run['perplexity_ratio']:.2f}"
        steered = percent(run["steered_steps"]) if "steered_steps" in run else ""
        lines.append(row(run["name"], *rates, perplexity, f"{run['distinct_2']:.2f}", steered))
    return "\n".join(
        [
            *lines,
            "",
            f"{document['generations']} continuations of {document['prompts']} prompts, 32 tokens, SmolLM2-135M in "
            "bfloat16; behind the comma the difference from base in points, 95 % interval by prompt. "
            f"`{document['command']}`, {document['date']}.",
        ]
    )


def serving(document: dict[str, Any]) -> str:
    """Throughput of steered vLLM."""
    lines = [
        row("requests", "run", "tokens per second", "relative to stock [range]", "interventions"),
        row(*["---"] * 5),
    ]
    for each in document["rows"]:
        low, high = each["relative_range"]
        ratio = f"{each['relative_to_stock']:.2f} [{low:.2f}, {high:.2f}]"
        steps = percent(each["interventions"] / each["tokens"])
        lines.append(row(str(each["requests"]), each["run"], f"{each['tokens_per_second']:.1f}", ratio, steps))
    machine, versions = document["machine"], document["versions"]
    return "\n".join(
        [
            *lines,
            "",
            f"{document['model']}, no CUDA graphs or compilation, medians of rounds in which the engines take turns, "
            f"step by step, {machine['threads']} thread, {machine['device']}, vLLM {versions['vllm']}, torch "
            f"{versions['torch']}. `{document['command']}`, {document['date']}.",
        ]
    )


def serving_efficacy(document: dict[str, Any]) -> str:
    """Rates under either engine, without and with the filter."""
    engines = document["engines"]
    lines = [row("judge", "run", *engines, "vLLM minus transformers"), row(*["---"] * (3 + len(engines)))]
    for judge in next(iter(engines.values()))["judges"]:
        judged = [engine["judges"][judge] for engine in engines.values()]
        differences = document["vllm_minus_transformers"]
        base = [percent(each["base"]) for each in judged]
        lines.append(row(JUDGES[judge], "base", *base, span(differences["base"][judge])))
        steered = [f"{percent(e['filter']['rate'])} {span(e['filter']['rate_interval'])}" for e in judged]
        lines.append(row(JUDGES[judge], "filter", *steered, span(differences["filter"][judge])))
    steps = [percent(engine["intervention_rate"]) for engine in engines.values()]
    lines.append(row("steps intervened", "filter", *steps, ""))
    return "\n".join(
        [
            *lines,
            "",
            f"{document['generations']} continuations of {document['prompts']} prompts in each cell, bfloat16; in "
            f"brackets 95 % intervals by prompt, differences in points. `{document['command']}`, {document['date']}.",
        ]
    )


def replace(path: Path, name: str, table: str) -> None:
    """Put `table` between the markers `<!-- name -->` and `<!-- /name -->` of a Markdown file."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: f"{match[1]}{table}\n{match[2]}", path.read_text("utf-8"))
    if count != 1:
        raise ValueError(f"{path} has no place for the table {name!r}.")
    path.write_text(text, "utf-8")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))  # type: ignore[no-any-return]


def main() -> None:
    replace(ROOT / "docs" / "results.md", "efficacy", efficacy(load("smollm2-135m-toxicity-final")))
    toxicity = trade_off(load("smollm2-135m-toxicity"), "hf-value-steer run examples/recipes/smollm2-toxicity.yaml")
    replace(ROOT / "docs" / "results.md", "trade-off", toxicity)
    sentiment = trade_off(load("smollm2-135m-sentiment"), "hf-value-steer run examples/recipes/smollm2-sentiment.yaml")
    replace(ROOT / "docs" / "results.md", "sentiment", sentiment)
    ways = load("ways")
    replace(ROOT / "docs" / "results.md", "ways", trade_off(ways, ways["command"]))
    measured = sorted(path.stem for path in RESULTS.glob("overhead-*.json"))
    replace(ROOT / "docs" / "results.md", "overhead", overhead([load(name) for name in measured]))
    replace(ROOT / "docs" / "results.md", "depth", depth(load("depth")))
    tables = {
        "rollback": rollback, "going-back": going_back, "onset-heads": tried, "fresh-texts": promises,
        "abstention-arithmetic": abstention, "operating-point": operating_point, "sentiment-heads": steering_heads,
    }  # fmt: skip
    for name, table in tables.items():
        replace(ROOT / "docs" / "results.md", name, table(load(name)))
    replace(ROOT / "docs" / "activation.md", "activation", activation(load("activation-toxicity")))
    replace(ROOT / "docs" / "serving.md", "serving", serving(load("serving-cpu")))
    replace(ROOT / "docs" / "serving.md", "serving efficacy", serving_efficacy(load("serving-efficacy")))
    for page in sorted((ROOT / "docs").glob("*.html")):
        document = load(page.stem)
        if (RESULTS / f"examples-{page.stem}.json").exists():
            document |= load(f"examples-{page.stem}")
        page.write_text(sweep_page(document) if "window" in document else render_report(document), "utf-8")


if __name__ == "__main__":
    main()
