"""Write the tables of README.md and of the head's card from the result files: `python -m benchmarks.tables`."""

import json
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def percent(number: float) -> str:
    return f"{100 * number:.1f} %"


def span(bounds: list[float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def efficacy(document: dict[str, Any]) -> str:
    results = document["results"]
    judges = results["base"]["judges"]
    header = [name + " (gave the labels)" * judge["gave_labels"] for name, judge in judges.items()]
    lines = [
        row("", *header, "perplexity", "steps intervened"),
        row(*["---"] * (len(judges) + 3)),
    ]
    for name, result in results.items():
        rates = [f"{percent(judge['rate'])} {span(judge['rate_interval'])}" for judge in result["judges"].values()]
        ratio = "" if name == "base" else f" (x{result['perplexity_ratio']:.3f})"
        lines.append(row(name, *rates, f"{result['perplexity']:.1f}{ratio}", percent(result["intervention_rate"])))
    reductions = [
        f"{percent(judge['relative_reduction'])} {span(judge['relative_reduction_interval'])}"
        for judge in results["filter"]["judges"].values()
    ]
    lines.append(row("reduction by the filter", *reductions, "", ""))
    lines.append("")
    lines.append(
        f"{document['generations']} continuations of {document['prompts']} prompts, K={document['num_candidates']}, "
        f"threshold {document['head']['threshold']}; 95 % intervals by prompt. `{document['command']}`, "
        f"{document['date']}."
    )
    return "\n".join(lines)


def overhead(documents: list[dict[str, Any]]) -> str:
    dtypes = [document["dtype"] for document in documents]
    lines = [row("time, relative to plain `generate` unless said otherwise", *dtypes)]
    lines.append(row(*["---"] * (1 + len(documents))))
    for cases in zip(*(document["cases"] for document in documents), strict=True):
        cells = (
            f"{case['ratio_median']:.2f} [{min(case['ratios']):.2f}, {max(case['ratios']):.2f}]" for case in cases
        )
        lines.append(row(cases[0]["name"], *cells))
    memory = [f"{document['memory']['ratio']:.2f}" for document in documents]
    lines.append(row(f"peak memory, eager K=8, {documents[0]['memory']['prompt']:,}-token prompt", *memory))
    first = documents[0]
    machine, versions, pairs = first["machine"], first["versions"], len(first["cases"][0]["ratios"])
    lines.append("")
    lines.append(
        f"SmolLM2-135M, prompts of 64 tokens where the row says nothing, medians [range] of {pairs} pairs, "
        f"{machine['threads']} threads, "
        f"{machine['device']}, torch {versions['torch']}, transformers {versions['transformers']}. "
        f"`{first['command']}`, {first['date']}."
    )
    return "\n".join(lines)


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
    steering = efficacy(load("efficacy-toxicity"))
    replace(ROOT / "README.md", "efficacy", steering)
    replace(ROOT / "model_cards" / "smollm2-135m-toxicity" / "README.md", "efficacy", steering)
    measured = sorted(path.stem for path in RESULTS.glob("overhead-*.json"))
    replace(ROOT / "README.md", "overhead", overhead([load(name) for name in measured]))


if __name__ == "__main__":
    main()
