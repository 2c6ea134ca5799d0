"""What a calibration promises, in words."""

from hf_value_steer.choices import HeadMethod, PromiseMode


# The modes whose promise may fail with probability `delta`.
CONFIDENT = ("pac", "uniform", "selective")

_EVENTS = {"filter": "A new safe text is intervened on", "abstain": "A new answer is ended early"}
_SELECTIVE = "A new answer that is not ended early is wrong"
_LIMITS = {
    "filter": "this covers the first intervention on safe texts only, neither what follows it nor unsafe texts",
    "abstain": "this covers texts that nothing else steers",
}


def promise(mode: PromiseMode, method: HeadMethod, n: int, delta: float | None, grouped: bool) -> str:
    """One plain sentence: what happens how seldom, how sure that is, for which alpha, and what it leaves open.

    Args:
        mode, method, delta: as in [`Calibration`].
        n (`int`): number of calibration texts.
        grouped (`bool`): whether there are thresholds by group.
    """
    event = _SELECTIVE if mode == "selective" else _EVENTS[method]
    draw = f"the draw of the {n} calibration texts"
    sureness = f"on average over {draw}" if delta is None else f"with confidence {100 * (1 - delta):g} % in {draw}"
    chosen = "for one alpha that was chosen beforehand"
    if mode == "uniform":
        chosen = "for every alpha at once, so that it may be chosen after a look at the curve"
    groups = " (and so within each group, under its own threshold)" if grouped else ""
    return (
        f"{event} with probability at most alpha, {sureness}, {chosen}{groups}; {_LIMITS[method]}, and another "
        "sampler, head or backbone needs a calibration of its own."
    )
