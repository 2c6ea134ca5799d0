"""Where candidate tokens come from: the natural sample and its alternatives."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def natural_sample(scores: Tensor, do_sample: bool) -> tuple[Tensor, Tensor]:
    """Draw the token that plain `generate` draws, with the same calls on the same generator.

    Args:
        scores (`torch.FloatTensor` of shape `(rows, vocab)`): processed scores; `-inf` marks a forbidden token.
        do_sample (`bool`): multinomial sampling if `True`, argmax otherwise.

    Returns:
        `(tokens, possible)`, both of shape `(rows,)`: the drawn ids, and whether a row allows any token at all.
    """
    if not do_sample:
        tokens = scores.argmax(dim=-1)
        return tokens, scores.gather(1, tokens[:, None]).squeeze(1) > -torch.inf
    probabilities = scores.softmax(dim=-1)
    possible = ~probabilities[:, 0].isnan()
    if possible.device.type != "cpu" or not possible.all():  # on a GPU the host would wait for `all`
        probabilities.masked_fill_(~possible[:, None], 1.0)
    return torch.multinomial(probabilities, num_samples=1).squeeze(1), possible


def random_key(device: torch.device, seed: int | None) -> bytes:
    """The key of the alternatives' random stream, without consuming a number of the global generator.

    With `seed=None` it is a digest of the global generator's present state, so that it changes with
    `torch.manual_seed` and from call to call, and the natural samples stay those of plain `generate`.
    """
    if seed is None:
        state = _generator_state(device)
        return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


def another_key(key: bytes) -> bytes:
    """The key of a second stream, which tells nothing of the first."""
    return hashlib.blake2b(key, digest_size=16, person=b"selection").digest()


def _generator_state(device: torch.device) -> Tensor:
    """State of the generator from which `generate` draws on this device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "mps":  # it has one generator, whose state is asked for without a device
        return torch.mps.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def uniforms(key: bytes, rows: Sequence[int], step: int, count: int, visit: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) that depend on `(key, row, step, visit)` alone, float64, shape `(len(rows), count)`.

    A counter-based generator (Philox): the numbers of a row are the same whatever happens in other rows, in which
    order steps ask for them, or on which device the model runs; more of them never changes the first ones.
    """
    words = np.frombuffer(key, dtype=np.uint64)
    streams = (np.random.Generator(np.random.Philox(key=words, counter=[0, visit, row, step])) for row in rows)
    return torch.from_numpy(np.stack([stream.random(count, dtype=np.float32) for stream in streams])).double()


def sampled_alternatives(scores: Tensor, uniform: Tensor) -> Tensor:
    """Independent draws from the processed distribution by inversion, shape `(rows, count)`.

    Args:
        scores (`torch.FloatTensor` of shape `(rows, vocab)`): processed scores.
        uniform (`torch.DoubleTensor` of shape `(rows, count)`): numbers in [0, 1).
    """
    exact = scores.cpu() if scores.device.type == "mps" else scores  # MPS has no float64
    cumulative = exact.double().softmax(dim=-1).cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, uniform.to(cumulative.device) * cumulative[:, -1:], right=True)
    return tokens.clamp(max=scores.shape[-1] - 1).to(scores.device)  # a row without a law has none that fits


def likely_alternatives(scores: Tensor, natural: Tensor, count: int) -> Tensor:
    """The next most likely tokens after the natural one, shape `(rows, count)`, -1 where no token is left."""
    return most_likely(scores.scatter(1, natural[:, None], -torch.inf), count)


def most_likely(scores: Tensor, count: int) -> Tensor:
    """The most likely tokens, shape `(rows, count)`, -1 where no token is left."""
    top, ids = scores.topk(min(count, scores.shape[-1]), dim=-1)
    ids = ids.masked_fill(top == -torch.inf, -1)
    return torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1)
