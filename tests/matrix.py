"""Which model types can be steered, with which caches and kernels: measured on a tiny random model of each type.

    python -m tests.matrix --output docs/families.md

For every type: *identity* (a head that accepts everything changes no token of plain `generate`) and *oracle* (every
committed token is the one that the cache-free oracle picks, values to 1e-4), lazy and eager, in float32, on texts
three times as long as the sliding windows, with left padding. And for heads on a layer (the first, the middle and the
last one of at least four): whether tokens can be judged there, or behind the last layer alone.
"""

import argparse
import itertools
import json
import warnings
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers import set_seed

from hf_value_steer import BlockCache, ValueFilterConfig, value_steer_generate
from hf_value_steer.backbone.parts import decoder_layers
from hf_value_steer.generation.families import VERIFIED
from hf_value_steer.generation.kernels import KERNELS
from hf_value_steer.hosts.transformers import CACHE
from tests.families import accepting_head, layered_head, prompts, random_head
from tests.oracle import Oracle
from tests.tiny_models import CACHE_DISAGREES, MODEL_TYPES, UNBUILDABLE, build_tiny


CACHES = ("dynamic", "block", "static")
NEW_TOKENS, SEED = 14, 5
DEPTH = 4  # layers, at least, where heads on layers are verified
SAMPLING = {"do_sample": True, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": NEW_TOKENS}


class Everything:
    """A set that holds whatever one asks for."""

    def __contains__(self, _item):
        return True

    def __iter__(self):
        return iter(())


def let_everything_in():
    """Take the list of verified types out of the way."""
    stack = ExitStack()
    for name in ("validation.VERIFIED", "kernels.MASKED", "kernels.SHARED_PREFIX"):
        stack.enter_context(mock.patch(f"hf_value_steer.generation.{name}", Everything()))
    stack.enter_context(mock.patch.dict("hf_value_steer.generation.validation.NEEDS", clear=True))
    return stack


def plain(model, inputs, cache=None, **extra):
    """Plain `generate` with a cache by name."""
    set_seed(SEED)
    return model.generate(**inputs, **SAMPLING, **named_cache(model, cache), return_dict_in_generate=True, **extra)


def steered(model, inputs, cache, head, threshold, **options):
    config = ValueFilterConfig(value_head=head, threshold=threshold, num_candidates=4, **options)
    extra = {"custom_generate": value_steer_generate, "value_steer": config, "output_logits": True}
    return plain(model, inputs, cache, **extra)


def named_cache(model, name):
    if name == "block":
        return {CACHE: BlockCache(model.config)}
    return {"cache_implementation": name}


def usable_prompts(model):
    """Left-padded prompts if the family knows what to do with them, else prompts of one length; whether it does."""
    padded, options = prompts(3), {"max_new_tokens": 10, "eos_token_id": None, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    together = torch.stack(model.generate(**padded, **options).logits, dim=1)
    for row, mask in enumerate(padded["attention_mask"]):
        alone = model.generate(padded["input_ids"][row, mask.bool()][None], **options)
        if not torch.allclose(torch.cat(alone.logits), together[row], rtol=1e-3, atol=1e-3):
            whole = padded["input_ids"].clamp(min=3)
            return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}, False
    return padded, True


def ask_oracle(model, inputs, head):
    """What the oracle commits, and the oracle."""
    oracle = Oracle(ValueFilterConfig(value_head=head, threshold=0.5, num_candidates=4))
    set_seed(SEED)
    return model.generate(**inputs, **SAMPLING, custom_generate=oracle), oracle


def expectation(model, inputs):
    """What the oracle commits: `(sequences, values)`."""
    sequences, oracle = ask_oracle(model, inputs, random_head(model))
    assert any(map(any, oracle.interventions)), "the oracle never intervened: a test that cannot fail"
    return sequences, oracle.values


def differs(out, sequences, values):
    """`None`, or what of a steered text is not as the oracle has it."""
    if not torch.equal(out.sequences, sequences):
        return "oracle: other tokens"
    for row, wanted in enumerate(values):
        if not torch.allclose(out.token_values[row, : len(wanted)], torch.tensor(wanted), rtol=0, atol=1e-4):
            return "oracle: other values"
    return None


def check(model, inputs, cache, kernel, evaluation, expected):
    """`None`, or what is wrong with steering in one line."""
    options = {"lookahead": kernel, "evaluation": evaluation}
    if wrong := differs(steered(model, inputs, cache, random_head(model), 0.5, **options), *expected):
        return wrong
    same = steered(model, inputs, cache, accepting_head(model), 0.9, **options)
    base = plain(model, inputs, cache, output_logits=True)
    if not torch.equal(same.sequences, base.sequences):
        return "identity: other tokens than plain generate"
    if not torch.allclose(torch.stack(same.logits), torch.stack(base.logits), rtol=1e-3, atol=1e-3):
        return "identity: other logits than plain generate"
    return None


def one_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def attempt(function, *arguments):
    """`"ok"`, or what went wrong in one line."""
    try:
        return function(*arguments) or "ok"
    except Exception as error:
        return one_line(error)


def examine(model_type):
    """What works for one type: `{"padding": bool, cache: {kernel: "ok" or a reason}}`, or `{"reason": ...}`."""
    try:
        model = build_tiny(model_type)
        inputs, padding = usable_prompts(model)
        base = plain(model, inputs).sequences
        expected = expectation(model, inputs)
    except Exception as error:
        return {"reason": f"without steering: {one_line(error)}"}
    result = {"padding": padding}
    for cache in CACHES:
        try:
            trusted = torch.equal(plain(model, inputs, cache).sequences, base)
        except Exception as error:
            result[cache] = f"plain generate: {one_line(error)}"
            continue
        if not trusted:
            result[cache] = "plain generate gives other tokens than with its default cache"
            continue
        result[cache] = {
            kernel: next(
                (
                    wrong
                    for evaluation in ("lazy", "eager")
                    if (wrong := attempt(check, model, inputs, cache, kernel, evaluation, expected)) != "ok"
                ),
                "ok",
            )
            for kernel in KERNELS
        }
    return result


# Why the others are refused, where `tiny_models` does not say it.
_INDEXED = "sparse attention with an indexer, whose cache layers cannot look ahead yet"
_OWN_CACHE = "keeps a cache of its own that `transformers` cannot roll back"
_POSITIONS = "its forward numbers positions in another way than `generate`: plain generation differs from a forward"
REASONS = {
    **dict.fromkeys(["axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", "qwen4_exp", "qwen4_exp_text"], _INDEXED),
    **dict.fromkeys(["minimax", "xlnet", "xlstm", "minimax_m3_vl_text"], _OWN_CACHE),
    **dict.fromkeys(["camembert", "data2vec-text", "roberta", "roberta-prelayernorm"], _POSITIONS),
    **dict.fromkeys(["xlm-roberta", "xlm-roberta-xl", "xmod"], _POSITIONS),
    **dict.fromkeys(["openai-gpt", "xlm"], "has no cache"),
    "inkling_text": "its hybrid sliding layers make masks of their own",
    "mllama": "its cross-attention layers leave empty cache layers without an image",
    "mpt": "its configuration turns the cache off",
    **CACHE_DISAGREES,
    **UNBUILDABLE,
}


def depth_oracle(model, inputs, layer):
    """What the oracle commits by a head on one layer."""
    head = layered_head(model, [layer])
    return head, *ask_oracle(model, inputs, head)


def check_depth(model, inputs, cache, kernel, evaluation, head, sequences, oracle):
    """`None`, or what is wrong with a head on a layer in one line."""
    out = steered(model, inputs, cache, head, 0.5, lookahead=kernel, evaluation=evaluation)
    return differs(out, sequences, oracle.values)


def judged(model, inputs, cases, at_depth):
    """The first thing that is wrong if tokens are judged at the layer, or behind the last one; else `"ok"`."""
    types = Everything() if at_depth else frozenset()
    with mock.patch("hf_value_steer.generation.depth.AT_DEPTH", types):
        for cache, kernel, evaluation, expected in cases:
            wrong = attempt(check_depth, model, inputs, cache, kernel, evaluation, *expected)
            if wrong != "ok":
                return f"{cache} {kernel} {evaluation} layer {expected[0].config.feature_layers}: {wrong}"
    return "ok"


def examine_depth(model_type):
    """How heads on layers can be used with one type: `{"depth": "ok" or a reason, "end": the same}`."""
    try:
        model = build_tiny(model_type, DEPTH)
        inputs, _ = usable_prompts(model)
        base = plain(model, inputs).sequences
        last = len(decoder_layers(model)) - 1
        oracles = [depth_oracle(model, inputs, layer) for layer in sorted({0, last // 2, last})]
        if not any(map(any, (row for _, _, oracle in oracles for row in oracle.interventions))):
            return {"reason": "the oracle never intervened"}
    except Exception as error:
        return {"reason": one_line(error)}
    caches = [cache for cache in ("dynamic", "static") if writes(model, inputs, cache, base)]
    cases = list(itertools.product(caches, ("auto", "expanded"), ("lazy", "eager"), oracles))
    interventions = sum(map(sum, (row for _, _, oracle in oracles for row in oracle.interventions)))
    return {
        "interventions": interventions,
        "depth": judged(model, inputs, cases, True),
        "end": judged(model, inputs, cases, False),
    }


def writes(model, inputs, cache, base):
    """Whether plain `generate` writes the same text with this cache."""
    try:
        return torch.equal(plain(model, inputs, cache).sequences, base)
    except Exception:
        return False


def usable(result, kernel):
    """Whether a kernel works with every cache that the family itself works with."""
    caches = [result.get(cache) for cache in CACHES]
    return isinstance(caches[0], dict) and all(cache[kernel] == "ok" for cache in caches if isinstance(cache, dict))


def page(results):
    """The table as Markdown."""
    passed = {name: result for name, result in results.items() if usable(result, "expanded")}
    lines = [
        "# Model types",
        "",
        f"`python -m tests.matrix --output docs/families.md` (transformers {transformers.__version__}, torch "
        f"{torch.__version__.split('+')[0]}, CPU, float32) passed {len(passed)} of the "
        f"{len(results) + len(UNBUILDABLE)} types that `AutoModelForCausalLM` knows, on a tiny random model of each: "
        "identity and oracle, lazy and eager, past the sliding window. Everything else is refused by name before the "
        "first token.",
        "",
        "| type | `shared_prefix` | `masked` | `expanded` | caches | left padding |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in passed.items():
        kernels = " | ".join("yes" if usable(result, kernel) else "" for kernel in KERNELS)
        caches = ", ".join(cache for cache in CACHES if isinstance(result[cache], dict))
        lines.append(f"| {name} | {kernels} | {caches} | {'yes' if result['padding'] else 'not in this family'} |")
    lines += ["", "A cache is missing where plain `generate` itself fails with it or gives other tokens.", ""]
    lines += ["| refused | why |", "|---|---|"]
    lines += [f"| {name} | {REASONS[name]} |" for name in sorted([*results, *UNBUILDABLE]) if name not in passed]
    return "\n".join(lines) + "\n"


def depth_page(results):
    """How heads on layers can be used with each type, as Markdown."""
    ways = {"depth": [], "end": [], "refused": []}
    for name, result in results.items():
        way = next((way for way in ("depth", "end") if result.get(way) == "ok"), "refused")
        ways[way].append(name)
    interventions = sum(result.get("interventions", 0) for result in results.values())
    listed = {way: ", ".join(f"`{name}`" for name in names) for way, names in ways.items()}
    return f"""# Heads on layers, by model type

`python -m tests.matrix --depth --output docs/depth.md` (transformers {transformers.__version__}, torch
{torch.__version__.split("+")[0]}, CPU, float32): a head on the first, the middle and the last layer of a tiny random
model of each type that can be steered, with at least {DEPTH} layers, against the oracle; lazy and eager, dynamic and
static caches, left padding; {interventions:,} interventions.

**Judged at the head's layer, {len(ways["depth"])} types**: {listed["depth"]}.

**Judged behind the last layer, {len(ways["end"])} types**: {listed["end"]}. Layers above read the token again, or
layers hand on more than one state, so that a look-ahead goes through all of them. What is written is the same.

**Not tried or refused, {len(ways["refused"])} types**: {listed["refused"]}. Their layers are not one list of modules
that hand on `(rows, positions, width)`, so that a head on layers is refused; or {transformers.__version__} does not
build them by themselves.

A model of text and images, and any other that holds one of these, is used as the language model inside it.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, all by default")
    parser.add_argument("--depth", action="store_true", help="heads on layers alone")
    parser.add_argument("--output", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    results = {}
    with nullcontext() if arguments.depth else let_everything_in():
        for model_type in arguments.types or (sorted(VERIFIED) if arguments.depth else MODEL_TYPES):
            results[model_type] = (examine_depth if arguments.depth else examine)(model_type)
            print(model_type, json.dumps(results[model_type]), flush=True)
    if arguments.output:
        arguments.output.write_text((depth_page if arguments.depth else page)(results))


if __name__ == "__main__":
    main()
