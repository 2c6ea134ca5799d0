"""`GuidanceModule`: from the state of a token to its value, its correction, and K bridge tokens."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.cards.guidance import guidance_card
from hf_value_steer.configuration.guidance_module import GuidanceModuleConfig
from hf_value_steer.files.schema import register
from hf_value_steer.files.writing import write_new
from hf_value_steer.guidance.parts import BridgeGenerator, Discriminator, PromptAttention, Standardise, encoder
from hf_value_steer.heads.artefact import Artefact


@dataclass
class GuidanceModuleOutput(ModelOutput):  # type: ignore[misc]
    """What the module makes of some tokens.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): binary cross-entropy, when `labels` were given.
        logits (`torch.FloatTensor` of shape `(rows, tokens)`): of the discriminator, positive is undesirable.
        value (`torch.FloatTensor` of shape `(rows, tokens)`): their sigmoid.
        corrections (`torch.FloatTensor` of shape `(rows, tokens, value_width)`): delta_z, zero where it is content.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    value: Tensor | None = None
    corrections: Tensor | None = None


class GuidanceModule(Artefact):
    """The value module of stable value guidance (arXiv 2605.11712). Always float32, whatever is asked for.

    ```python
    module = GuidanceModule.from_pretrained("org/module")
    out = model.generate(**inputs, value_steer=GuidanceConfig(module=module))
    ```
    """

    config_class = GuidanceModuleConfig
    main_input_name = "states"
    kind = "guidance module"

    def __init__(self, config: GuidanceModuleConfig):
        super().__init__(config)
        width, value_width, dropout = config.hidden_size, config.value_width, config.dropout
        self.standardise = Standardise(width)
        self.unconditional = encoder(width, value_width, dropout)
        self.conditional = (
            PromptAttention(width, value_width, config.value_heads, dropout) if config.conditional else None
        )
        self.normaliser = nn.Sequential(
            nn.Linear(value_width, value_width), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(value_width)
        )
        self.discriminator = Discriminator(value_width, dropout)
        self.generator = BridgeGenerator(width, value_width, config.num_bridges, config.bridge_heads)
        self.to(torch.float32)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts are made as they are to be."""

    def set_statistics(self, mean: Tensor, scale: Tensor) -> None:
        """Adapt to a backbone whose states have this mean and scale, `(width,)`: bridges look like its states, too."""
        norm = self.generator.norm
        with torch.no_grad():
            for target, source in ((self.standardise.mean, mean), (self.standardise.scale, scale)):
                target.copy_(source)
            norm.weight.copy_(scale)
            norm.bias.copy_(mean)

    def read_prompt(self, states: Tensor) -> Tensor:
        """Keys and values of prompts, `(rows, length, 2 * value_width)`, from states `(rows, length, hidden_size)`."""
        if self.conditional is None:
            return states.new_empty(*states.shape[:-1], 0, dtype=torch.float32)
        return self.conditional.read(self.standardise(states))

    def encode(self, states: Tensor, prompt: Tensor | None, prompt_mask: Tensor) -> Tensor:
        """`z = R(f_u(h) + lambda * CrossAttn(f_c(h), f_c(h_prompt)))`, `(rows, tokens, value_width)`.

        Args:
            states (`torch.FloatTensor` of shape `(rows, tokens, hidden_size)`).
            prompt (`torch.FloatTensor` of shape `(rows, length, 2 * value_width)`, *optional*): of `read_prompt`;
                without it the conditional path is left out, as in the first stage of training.
            prompt_mask (`torch.BoolTensor` of shape `(rows, length)`): False where the prompt is padding.
        """
        states = self.standardise(states)
        value = self.unconditional(states)
        if self.conditional is not None and prompt is not None:
            value = value + self.conditional(states, prompt, prompt_mask)
        return self.normaliser(value)  # type: ignore[no-any-return]

    def correct(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(...)` and corrections delta_z `(..., value_width)` of values `(..., value_width)`."""
        config = self.config
        logits, gradient = self.discriminator(value), self.discriminator.gradient(value)
        margin = (logits - math.log(config.threshold / (1 - config.threshold)))[..., None]
        if config.correction == "gradient":
            return logits, -config.step * gradient * (margin > 0)
        return logits, -config.step * margin.relu() * gradient / gradient.square().sum(dim=-1, keepdim=True)

    def bridge(self, states: Tensor, corrections: Tensor, questions: Tensor | None = None) -> Tensor:
        """Bridges `(..., K, hidden_size)` of states `(..., hidden_size)` and corrections `(..., value_width)`.

        With the `questions` of the generator, they are not computed anew.
        """
        return self.generator(self.standardise(states), corrections, questions)  # type: ignore[no-any-return]

    def injection(self, states: Tensor, corrections: Tensor, questions: Tensor | None = None) -> Tensor:
        """What is added to the state instead of bridges, `(..., 1, hidden_size)`: the mean over the K seeds."""
        attended = self.generator.attend(self.standardise(states), corrections, questions).mean(dim=-2, keepdim=True)
        return attended * self.standardise.scale

    def forward(
        self, states: Tensor, prompt_states: Tensor | None, prompt_mask: Tensor, labels: Tensor | None = None
    ) -> GuidanceModuleOutput:
        """Value tokens.

        Args:
            states (`torch.FloatTensor` of shape `(rows, tokens, hidden_size)`): outputs of layer `config.layer`.
            prompt_states (`torch.FloatTensor` of shape `(rows, length, hidden_size)`, *optional*): the same of their
                prompts; without them the conditional path is left out.
            prompt_mask (`torch.BoolTensor` of shape `(rows, length)`): False where a prompt is padding.
            labels (`torch.FloatTensor` of shape `(rows, tokens)`, *optional*): targets in [0, 1], NaN where a token
                does not count.
        """
        prompt = None if prompt_states is None else self.read_prompt(prompt_states)
        value = self.encode(states, prompt, prompt_mask)
        logits, corrections = self.correct(value)
        loss = None
        if labels is not None:
            counted = ~labels.isnan()
            loss = nn.functional.binary_cross_entropy_with_logits(logits[counted], labels[counted].float())
        return GuidanceModuleOutput(loss=loss, logits=logits, value=logits.sigmoid(), corrections=corrections)

    def write_card(self, folder: Path) -> None:
        write_new(folder / "README.md", lambda: str(guidance_card(self.facts())))

    def fingerprint(self) -> str:
        """Identity of what the module does: a digest of its weights."""
        return fingerprint(self)


register(GuidanceModuleConfig)
AutoModel.register(GuidanceModuleConfig, GuidanceModule)
