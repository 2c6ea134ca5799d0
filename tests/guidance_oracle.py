"""The slowest correct implementation of guidance: no cache, no batch, no hooks, the whole text computed anew.

A row is one list of states: those of the tokens, and beside them those of the bridge of every step. Through the layers
above l* they go together; a token sees the tokens up to itself and the bridge that held when it was read, a bridge
what the token sees that it was made from. Layers are called by hand, so each kind of model is written out.
"""

from typing import Any

import torch


@torch.no_grad()
def guided_logits(
    model: Any,
    module: Any,
    tokens: torch.Tensor,
    prompt: int,
    interval: int,
    momentum: float,
    neutral: bool,
    read: int | None = None,
    states: dict[int, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[bool]]:
    """Logits of what comes after each of `tokens[prompt - 1 :]`, and whether a bridge was shown to it.

    `read` tokens are what the module takes for the prompt, if not all before those that are guided. Into `states` go
    those of the tokens, by layer, `(length, width)` each.
    """
    count, length, above = module.config.num_bridges, len(tokens), module.config.layer + 1
    states = {} if states is None else states
    hidden, layers = embed(model, tokens)
    for index in range(above):
        hidden = call(model, layers, index, hidden, torch.arange(length), text_mask(model, index, length))
        states[index] = hidden[0]
    bridges, makers, shown, held = all_bridges(module, hidden, prompt, interval, momentum, neutral, read or prompt)
    hidden = torch.cat([hidden, *bridges], dim=1)
    positions = torch.tensor([*range(length), *(maker for maker in makers for _ in range(count))])
    for index in range(above, len(layers)):
        text = text_mask(model, index, length)
        mask = torch.zeros(len(positions), len(positions), dtype=torch.bool)
        mask[:length, :length] = text
        for number, maker in enumerate(makers):
            own = slice(length + number * count, length + (number + 1) * count)
            mask[own, :length], mask[own, own] = text[maker], True
            for token in range(prompt - 1, length):
                if held[token] == number and shown[number]:
                    mask[token, own] = True
        hidden = call(model, layers, index, hidden, positions, mask)
        states[index] = hidden[0, :length]
    return unembed(model, hidden[0, prompt - 1 : length]), [shown[held[token]] for token in range(prompt - 1, length)]


def all_bridges(
    module: Any, states: Any, prompt: int, interval: int, momentum: float, neutral: bool, read: int
) -> Any:
    """The bridge of each refresh, the token that it was made from, whether it is shown; and which one a token has."""
    bridges, makers, shown, held = [], [], [], {}
    memory, everything = module.read_prompt(states[:, :read]), torch.ones(1, read, dtype=torch.bool)
    for step, token in enumerate(range(prompt - 1, states.shape[1])):
        if step == 0 or (interval and step % interval == 0):
            logits, delta = module.correct(module.encode(states[:, token : token + 1], memory, everything))
            bridge = module.bridge(states[:, token], delta[:, 0])
            if bridges:
                bridge = momentum * bridges[-1] + (1 - momentum) * bridge
            bridges.append(bridge)
            makers.append(token)
            shown.append(not neutral or logits.sigmoid().item() > module.config.threshold)
        held[token] = len(bridges) - 1
    return bridges, makers, shown, held


def text_mask(model: Any, index: int, length: int) -> torch.Tensor:
    """Which earlier tokens a token sees in a layer, `(length, length)`."""
    config = model.config
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    sliding = window is not None and (kinds is None or kinds[index] == "sliding_attention")
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return (distance >= 0) & (distance < (window if sliding else length))


def embed(model: Any, tokens: torch.Tensor) -> Any:
    """What enters the first layer, `(1, length, width)`, and the layers."""
    kind = model.config.model_type
    if kind == "gpt2":
        base = model.transformer
        return base.wte(tokens[None]) + base.wpe(torch.arange(len(tokens))), base.h
    if kind == "opt":
        base = model.model.decoder
        hidden = base.embed_tokens(tokens[None])
        hidden = base.project_in(hidden) if base.project_in is not None else hidden
        return hidden + base.embed_positions.weight[2 : len(tokens) + 2], base.layers
    return model.model.embed_tokens(tokens[None]), model.model.layers


def call(model: Any, layers: Any, index: int, hidden: Any, positions: torch.Tensor, mask: torch.Tensor) -> Any:
    """One decoder layer over states at these positions."""
    extra = {}
    if model.config.model_type not in ("gpt2", "opt"):
        kind = (model.config.layer_types[index],) if model.config.model_type == "gemma3_text" else ()
        extra["position_embeddings"] = model.model.rotary_emb(hidden, positions[None], *kind)
    return layers[index](hidden, attention_mask=mask[None, None], **extra)


def unembed(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    kind = model.config.model_type
    if kind == "gpt2":
        return model.lm_head(model.transformer.ln_f(hidden))
    if kind == "opt":
        base = model.model.decoder
        hidden = base.final_layer_norm(hidden) if base.final_layer_norm is not None else hidden
        return model.lm_head(base.project_out(hidden) if base.project_out is not None else hidden)
    return model.lm_head(model.model.norm(hidden))
