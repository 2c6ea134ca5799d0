"""What the tables of docs/ have in common."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
JUDGES = {
    "python:examples.toxicity:word_list": "word list (LDNOOBW)",
    "python:examples.toxicity:cuss": "cuss-inspect",
    "python:examples.toxicity:profanity": "label judge (alt-profanity-check, better-profanity)",
    "python:examples.sentiment:other_reviews_negative": "other reviews",
    "python:examples.sentiment:vader_negative": "VADER",
    "python:examples.sentiment:minilm_negative": "label judge (MiniLM)",
}


def percent(number: float) -> str:
    return f"{100 * number:.1f} %"


def span(bounds: list[float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
