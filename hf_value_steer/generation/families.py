"""Which model types were verified, and with which kernels besides `expanded`, which all of them can use.

`python -m tests.matrix` verifies them and writes `docs/families.md`; `tests/parity/test_matrix.py` checks a third.
"""

from packaging.version import Version

from hf_value_steer.hosts.transformers import VERSION


_EVERY_KERNEL = """
    afmoe apertus apertus1p5_text arcee aria_text beam bert bert-generation biogpt bitnet cohere cohere2
    cohere2_moe cohere_compass_text ctrl cwm dbrx dots1 electra emu3_text_model ernie ernie4_5 ernie4_5_moe
    exaone exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm
    glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium hrm_text
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama mellum
    minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder moshi nanochat nemotron olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe roc_bert
    sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2
""".split()
_SHARED_PREFIX = """
    bamba bart bigbird_pegasus blenderbot blenderbot-small falcon_mamba granitemoehybrid jamba lara_mini lfm2
    lfm2_moe lfm3 mamba mamba2 marian mbart nemotron_h olmo_hybrid pegasus plbart qwen3_5_moe_text
    qwen3_5_text qwen3_next whisper
""".split()
_MASKED = """
    axk1 big_bird codegen deepseek_v2 deepseek_v3 diffllama doge falcon flint gemma2 git glm4_moe_lite
    gpt_neox_japanese gpt_oss gptj granite_swa granitemoe_swa jetmoe longcat_flash megatron-bert mimo_v2_flash
    minicpm3 rembert sarvam_mla vaultgemma xglm youtu
""".split()
_EXPANDED = """
    bailing_hybrid bloom falcon_h1 gpt_neo kimi_linear llama4_text mvp roformer trocr zamba zamba2 zaya
""".split()

# Of texts with images; `tests/parity/test_images.py` verifies them.
WITH_IMAGES = frozenset({"qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text"})

# Their attention became exchangeable in a version of transformers.
SHARED_PREFIX_SINCE = {"codegen": "5.24", "gptj": "5.24"}

_SINCE = [name for name, since in SHARED_PREFIX_SINCE.items() if VERSION >= Version(since)]
SHARED_PREFIX = WITH_IMAGES.union(_EVERY_KERNEL, _SHARED_PREFIX, _SINCE)
MASKED = WITH_IMAGES.union(_EVERY_KERNEL, _MASKED)
VERIFIED = WITH_IMAGES.union(_EVERY_KERNEL, _SHARED_PREFIX, _MASKED, _EXPANDED)

# Heads on layers. In some types the layers above read the token again, or hand on more than a state: their tokens are
# judged behind the last layer. `python -m tests.matrix --depth` tells.
_READ_AGAIN = {"gemma4_text", "zamba", "zamba2", "zaya"}
_OTHER_LAYERS = {"emu3_text_model", "gemma3n_text", "hrm_text", "longcat_flash"}  # heads on layers are refused
AT_DEPTH = VERIFIED.difference(_READ_AGAIN, _OTHER_LAYERS, WITH_IMAGES)

# The oldest transformers whose cached decoding of these types is what their full forward computes.
NEEDS = dict.fromkeys(("big_bird", "git", "megatron-bert", "rembert", "roformer"), "5.18")
