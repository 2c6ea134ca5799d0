"""Tables about heads: what they do, at which price, and what was tried."""

from typing import Any

from benchmarks.markdown import JUDGES, percent, row, span


def efficacy(document: dict[str, Any]) -> str:
    """Rates and perplexity of every run of an evaluation."""
    names = {judge["name"]: JUDGES[judge["name"]] for judge in document["judges"]}
    lines = [row("", *names.values(), "perplexity", "steps intervened"), row(*["---"] * (len(names) + 3))]
    for run in document["runs"]:
        rates = [
            f"{percent(run['judges'][name]['rate'])} {span(run['judges'][name]['rate_interval'])}" for name in names
        ]
        ratio = run["perplexity_ratio"]
        perplexity = f"{run['perplexity']:.1f}" + ("" if run["method"] == "base" else f" (x{ratio:.3f})")
        steps = percent(run["intervention_rate"]) if "intervention_rate" in run else ""
        lines.append(row(run["name"], *rates, perplexity, steps))
    steered = next(run for run in document["runs"] if run["method"] == "filter")
    reductions = [
        f"{percent(judge['relative_reduction'])} {span(judge['relative_reduction_interval'])}"
        for judge in (steered["judges"][name] for name in names)
    ]
    lines.append(row("reduction by the filter", *reductions, "", ""))
    return "\n".join(
        [
            *lines,
            "",
            f"{document['generations']} continuations of {document['prompts']} prompts, each steered by one of "
            f"{document['folds']} heads, the one that was trained without it; 95 % intervals by prompt. "
            "`hf-value-steer run examples/recipes/smollm2-toxicity-final.yaml`.",
        ]
    )


def rated(judge: dict[str, Any]) -> str:
    return f"{percent(judge['rate'])} {span(judge['rate_interval'])}"


def fall(judge: dict[str, Any]) -> str:
    """How far a rate falls; of one that falls to 0 no resample knows how sure that is."""
    bounds = judge["relative_reduction_interval"]
    return percent(judge["relative_reduction"]) + (f" {span(bounds)}" if bounds else "")


def trade_off(document: dict[str, Any], command: str) -> str:
    """How far each judge's rate falls, beside what is touched, in every run of an evaluation."""
    names = {judge["name"]: JUDGES[judge["name"]] for judge in document["judges"]}
    costs = ["safe texts touched", "steps", "perplexity", "length", "distinct-2", "tokens a second"]
    lines = [row("", *names.values(), *costs), row(*["---"] * (1 + len(names) + len(costs)))]
    base = document["runs"][0]
    lines.append(row("base", *(rated(base["judges"][name]) for name in names), *[""] * 5, *_speed(base)))
    for run in document["runs"][1:]:
        falls = (run["judges"][name] for name in names)
        reduced = map(fall, falls)
        touched = f"{percent(run['touched_safe'])} {span(run['touched_safe_interval'])}"
        steps = percent(run["intervention_rate"]) if run.get("intervention_rate") is not None else ""
        relative = (run[key] / base[key] for key in ("mean_tokens", "distinct_2"))
        lines.append(
            row(
                run["name"], *reduced, touched, steps, f"x{run['perplexity_ratio']:.3f}",
                *(percent(each) for each in relative), *_speed(run),
            )
        )  # fmt: skip
    folds = f", each steered by one of {document['folds']} heads, the one that was trained without it"
    by = folds if document["folds"] > 1 else ""
    lines.append("")
    lines.append(
        f"{document['generations']:,} texts of {document['prompts']} prompts{by}; in brackets 95 % intervals by "
        f"prompt; rates of base, and by how much they fall. `{command}`."
    )
    return "\n".join(lines)


def _speed(run: dict[str, Any]) -> list[str]:
    return [f"{run['tokens_per_second']:.0f}" if run.get("tokens_per_second") else ""]


def tried(document: dict[str, Any]) -> str:
    """What each choice of layers, target and memory finds, at each share of safe texts."""
    choices = document["choices"]
    shares = [key for key in next(iter(choices.values())) if key not in ("folds", "seconds_to_train")]
    judges = list(next(iter(choices.values()))[shares[0]])
    titles = [f"{percent(float(share))}: {' / '.join(judges)}" for share in shares]
    lines = [row("head", *titles), row(*["---"] * (1 + len(shares)))]
    for name, choice in choices.items():
        cells = [" / ".join(f"{100 * choice[share][judge]['found']:.0f}" for judge in judges) for share in shares]
        lines.append(row(name, *cells))
    first = choices[next(iter(choices))][shares[0]][judges[0]]
    lines.append("")
    lines.append(
        f"In percent; {next(iter(choices.values()))['folds']} of the five folds; 95 % intervals by prompt are "
        f"like {span(first['interval'])} in the first cell. `{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def steering_heads(document: dict[str, Any]) -> str:
    """What each choice of layers, memory and filter does to each judge's rate, at the same promise."""
    names = {"other_reviews": "other reviews", "vader": "VADER", "minilm": "label judge (MiniLM)"}
    lines = [row("head", "AUROC", *names.values(), "safe texts touched", "steps", "length"), row(*["---"] * 8)]
    for name, entry in document["tried"].items():
        falls = (entry["judges"][judge] for judge in names)
        reduced = map(fall, falls)
        touched = f"{percent(entry['touched_safe'])} {span(entry['touched_safe_interval'])}"
        shares = (percent(entry[key]) for key in ("intervention_rate", "length"))
        lines.append(row(name, f"{entry['text_auroc']:.2f}", *reduced, touched, *shares))
    lines.append("")
    lines.append(
        f"How far each judge's rate falls in {document['texts']} texts of {document['prompts']} prompts that no head "
        f"was trained on, `alpha={document['alpha']}`; AUROC by the label judge, on validation texts. "
        f"`{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def promises(document: dict[str, Any]) -> str:
    """What became of each promise on fresh texts."""
    lines = [row("alpha", "threshold", "safe texts touched", "upper 95 % bound", "p-value"), row(*["---"] * 5)]
    for each in document["promises"]:
        share = f"{percent(each['share'])} ({each['touched']})"
        bound, chance = percent(each["upper_bound"]), f"{each['p_value']:.2f}"
        lines.append(row(f"{each['alpha']:g}", f"{each['threshold']:.4f}", share, bound, chance))
    lines.append("")
    lines.append(
        f"{document['safe_texts']} safe texts, one a prompt; thresholds from {document['calibration_texts']} others; "
        f"p-value of the one-sided exact binomial test. `{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def abstention(document: dict[str, Any]) -> str:
    """Accuracy of what is answered, by every way to choose, and what abstention does at the head's threshold."""
    shares = [f"right of {percent(share)}" for share in document["coverages"]]
    lines = [row("chosen by", "AURC", "more than the head", *shares), row(*["---"] * (3 + len(shares)))]
    for way in document["ways"]:
        low, high = way["more_than_head_interval"]
        more = "" if way["name"] == "head" else f"[{low:.3f}, {high:.3f}]"
        lines.append(row(way["name"], f"{way['aurc']:.3f}", more, *map(percent, way["accuracy"])))
    made = document["decisions"]
    lines.append("")
    lines.append(
        f"{document['problems']} problems that training never saw, {percent(document['accuracy'])} of them answered "
        f"right; brackets: 95 % bootstrap intervals of the difference. At the head's threshold {made['threshold']} "
        f"{percent(made['answered'])} are answered, {percent(made['accuracy'] or 0)} of these right; of the "
        f"{made['ended']} others {made['ended_before_the_first_token']} are ended before the first token, and "
        f"{percent(made['tokens_saved'])} of all tokens are saved. `{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def operating_point(document: dict[str, Any]) -> str:
    """What a head costs as it is meant to be used, beside plain `generate`."""
    lines = [row("dtype", "batch", "watched", "steered", "tokens replaced", "tokens taken back"), row(*["---"] * 6)]
    for case in document["cases"]:
        ratios = (f"x{case[f'{name}_median']:.3f} {case[name]}" for name in ("watched", "steered"))
        replaced = percent(case["interventions"] / case["steps"])
        lines.append(row(case["dtype"], str(case["batch"]), *ratios, replaced, str(case["taken_back"])))
    machine = document["machine"]
    lines.append("")
    lines.append(
        f"Time of whole calls beside plain `generate`: median and single rounds; 32 new tokens, {machine['threads']} "
        f"threads; threshold {document['threshold']:.2f}, K = {document['num_candidates']}, rollback "
        f"{document['rollback']}, layers {document['feature_layers']}. `{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)


def going_back(document: dict[str, Any]) -> str:
    """What the filter lets through, without and with going back."""
    names = list(document["runs"][0]["judges"])
    titles = (JUDGES[f"python:examples.toxicity:{name}"] for name in names)
    lines = [
        row("", *titles, "texts with unacceptable tokens", "such tokens", "safe texts touched", "forwards a token")
    ]
    lines.append(row(*["---"] * (5 + len(names))))
    for run in document["runs"]:
        rates = [rated(run["judges"][name]) for name in names]
        known = run["texts_with_unacceptable"]
        unacceptable = ["", ""] if known is None else [rated(known), f"{run['unacceptable']:,}"]
        touched = f"{percent(run['safe_touched'])} {span(run['safe_touched_interval'])}"
        lines.append(row(run["name"], *rates, *unacceptable, touched, f"{run['forwards_per_token']:.2f}"))
    lines.append("")
    for run in document["runs"]:
        if run["searches"]:
            found = f"{run['searches']} searches, {run['found']} found a way, {run['taken_back']} tokens taken back"
            lines.append(f"{run['name']}: {found}, {run['dead_ends']} dead ends left.")
    settings = document["settings"]
    lines.append(
        f"{document['prompts']} prompts, {settings['max_new_tokens']} tokens, K = {settings['num_candidates']}, "
        f"threshold {settings['threshold']}; each steered by the one of {len(document['folds'])} heads that was "
        f"trained without it; 95 % intervals by prompt. `{document['command']}`, {document['date']}."
    )
    return "\n".join(lines)
