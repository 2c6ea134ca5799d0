"""`ValueHead`: a small network from the feature of a token to a value in (0, 1)."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import ModelOutput

from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.calibration.artefact import FILE_NAME, Calibration
from hf_value_steer.cards.head import write_card
from hf_value_steer.cards.parts import Facts
from hf_value_steer.choices import Polarity
from hf_value_steer.configuration.value_head import ValueHeadConfig
from hf_value_steer.files.reading import LOCATION, find, read_object, reading
from hf_value_steer.files.schema import register
from hf_value_steer.heads.over_time import empty_memory, over_time
from hf_value_steer.heads.peer import FEATURE, fields_of, state_in, width_of
from hf_value_steer.heads.probes import FromProbes
from hf_value_steer.policy import acceptable


# How far beyond a threshold, in log odds, an attribute is at least: enough for a float32 sigmoid to tell the side.
_LEAST_MARGIN = 1e-6


@dataclass
class ValueHeadOutput(ModelOutput):  # type: ignore[misc]
    """Output of a value head.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): binary cross-entropy, when `labels` were given.
        logits (`torch.FloatTensor` of shape `(...)`): one logit for each feature.
        value (`torch.FloatTensor` of shape `(...)`): `sigmoid(logits)` in (0, 1), NaN where a logit is not finite.
        memory (`torch.FloatTensor`, *optional*): of a head over time, after the last token, see [`ValueHead.memory`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    value: Tensor | None = None
    memory: Tensor | None = None


class ValueHead(FromProbes):
    """The learned value of a hidden state (arXiv 2605.14746, 2604.18419). Always float32, whatever is asked for.

    ```python
    head = ValueHead.from_pretrained("org/head")
    values = head(hidden_states).value  # (batch, tokens, hidden_size) -> (batch, tokens)
    ```

    A head of several attributes (`attributes` in its config) answers with one value for all of them, so whatever takes
    a head takes it, too; [`attribute_values`] tells them apart.

    A head over time (`temporal` in its config) takes the tokens of a text in their order,
    `(..., tokens, hidden_size)`, and values each with those before it. What it has seen of a text goes on in `memory`.

    Attributes:
        calibration ([`~hf_value_steer.calibration.Calibration`], *optional*): what its thresholds promise; saved as
            `calibration.json` and loaded with the head. `alpha` in a runtime configuration needs it.
    """

    config_class = ValueHeadConfig
    kind = "value head"
    main_input_name = "hidden_states"
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["net"]

    def __init__(self, config: ValueHeadConfig):
        super().__init__(config)
        width, inner = config.hidden_size, config.projection_size or config.hidden_size
        outputs = 1 if config.attributes is None else len(config.attributes)
        layers: list[nn.Module] = [nn.Linear(inner, outputs)]
        if config.architecture == "mlp":
            layers = [nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, inner), nn.ReLU(), *layers]
        self.net = nn.Sequential(*layers).to(torch.float32)
        self.calibration: Calibration | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None, memory: Tensor | None = None
    ) -> ValueHeadOutput:
        """Value each feature.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): features, of any floating dtype. For a
                head over time of shape `(..., tokens, hidden_size)`.
            labels (`torch.FloatTensor` of shape `(...)`, *optional*): targets in [0, 1]. For a head of A attributes of
                shape `(..., A)`: whether each is there, whatever its polarity. The loss is the mean over them.
            memory (`torch.FloatTensor`, *optional*): of a head over time, what it has seen before these tokens, see
                [`ValueHead.memory`]; nothing by default.
        """
        logits, memory = self._attribute_logits(hidden_states, memory)
        loss = None
        if labels is not None:
            loss = nn.functional.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.float())
        logits = logits.squeeze(-1) if self.config.attributes is None else self._combined(logits)
        return ValueHeadOutput(loss=loss, logits=logits, value=_values(logits), memory=memory)

    @property
    def remembers(self) -> int:
        """How many numbers it remembers of a text, beside the number of its tokens; 0 if it is no head over time."""
        return 0 if self.config.temporal == "none" else int(self.net[0].out_features)  # type: ignore[arg-type]

    def memory(self, rows: int) -> Tensor:
        """What it remembers of `rows` texts of which it has seen no token, `(rows, 1 + remembers)`."""
        return empty_memory(rows, self.remembers, self.device)

    def attribute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits of each attribute, `(..., A)`; A is 1 where the config names no `attributes`.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): features, of any floating dtype; for a
                head over time those of whole texts, `(..., tokens, hidden_size)`.
        """
        return self._attribute_logits(hidden_states, None)[0]

    def _attribute_logits(self, hidden_states: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits `(..., A)`, and the memory after the last token of a head over time."""
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"`hidden_states` has width {hidden_states.shape[-1]}, but this value head has hidden_size="
                f"{self.config.hidden_size} (backbone {self.config.backbone!r}); load the head of your backbone."
            )
        with torch.autocast(hidden_states.device.type, enabled=False):
            if not self.remembers:
                return self.net(hidden_states.float()), None
            projected = self.net[0](hidden_states.float())
            if memory is None:
                memory = self.memory(1)[0].expand(*projected.shape[:-2], -1)
            states, memory = over_time(projected, memory, self.config.temporal, self.config.temporal_decay)
            for layer in list(self.net)[1:]:
                states = layer(states)
            return states, memory

    def attribute_values(self, hidden_states: Tensor) -> Tensor:
        """How much each attribute is there, `(..., A)` in (0, 1), NaN where a logit is not finite.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(..., hidden_size)`): features, of any floating dtype.
        """
        return _values(self.attribute_logits(hidden_states))

    def _combined(self, logits: Tensor) -> Tensor:
        """The logits `(...)` that stand for those of all attributes, `(..., A)`; NaN where one is not finite."""
        attributes, values = self.config.attributes, logits.sigmoid()
        margins = [_margins(logits[..., i], values[..., i], of) for i, of in enumerate(attributes)]
        if self.config.combine == "worst":
            combined = torch.stack(margins).amax(dim=0)
        else:
            total = sum(of["weight"] for of in attributes)
            weighted = [of["weight"] / total * margin for of, margin in zip(attributes, margins, strict=True)]
            combined = torch.stack(weighted).sum(dim=0)
        return combined.masked_fill(~logits.isfinite().all(dim=-1), torch.nan)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a head from a folder or the Hub: `config.json` and `model.safetensors`, never a pickle.

        `calibration.json` is read where there is one.

        Raises:
            OSError: if there is nothing there, or the Hub cannot be reached.
            ArtefactError: if this is no value head, or a damaged one: it names the file.
        """
        location = {name: kwargs[name] for name in LOCATION if name in kwargs}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        head = loaded[0] if isinstance(loaded, tuple) else loaded
        calibrated = find(str(pretrained_model_name_or_path), FILE_NAME, cls.kind, optional=True, **location)
        head.calibration = Calibration.load(calibrated.parent) if calibrated else None
        return loaded

    def facts(self) -> Facts:
        """What its card tells of it: its calibration, too."""
        calibration = None if self.calibration is None else self.calibration.to_dict(scores=False)
        return replace(super().facts(), calibration=calibration)

    def write_card(self, folder: Path) -> None:
        write_card(self.facts(), folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write `config.json`, `model.safetensors`, and `calibration.json` if the head is calibrated.

        Where there is no `README.md` yet, one is generated.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.calibration is not None:
            self.calibration.save(save_directory)

    def fingerprint(self) -> str:
        """Identity of what the head answers: of its weights and, where they are not the default, of what it reads."""
        weights, config = fingerprint(self), self.config
        parts = [weights]
        if config.attributes is not None:
            parts += [config.combine, config.attributes]
        if not config.reads_final_alone:
            parts += [config.feature_layers, config.temporal, config.temporal_decay]
        if len(parts) == 1:
            return weights
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_value_steer(
        cls,
        path: str | os.PathLike[str],
        hidden_size: int | None = None,
        polarity: Polarity = "undesirable",
        **config: Any,
    ) -> "ValueHead":
        """Read a checkpoint of the value-steer package: `path` and, if it is there, `path + ".meta.json"`.

        Args:
            path: the `.bin` file, a state dict of the MLP; read with `weights_only=True`.
            hidden_size (`int`, *optional*): width of the feature; read off the weights by default.
            polarity (`str`): the file does not say: `"undesirable"` for its filter, `"desirable"` for its abstention.
            config: further fields of [`ValueHeadConfig`].

        Raises:
            OSError: if there is no such file.
            ArtefactError: if it holds something else, or is damaged.
        """
        with reading(path, "value-steer head"):
            state = state_in(path)
            width = width_of(state, Path(path).stat().st_size)
        if hidden_size not in (None, width):
            raise ValueError(f"`hidden_size` is {hidden_size}, but the weights in {path} have width {width}.")
        sidecar = Path(f"{path}.meta.json")
        if sidecar.exists():
            with reading(sidecar, "sidecar of a value-steer head"):
                config = {**fields_of(read_object(sidecar)), **config}
        head = cls(ValueHeadConfig(hidden_size=width, polarity=polarity, **config))
        head.net.load_state_dict(state)
        with reading(path, "value-steer head"):
            head.require_finite()
        head.eval()
        return head

    def save_value_steer(self, path: str | os.PathLike[str]) -> tuple[str, str]:
        """Write the files that value-steer's `save_probe_checkpoint` writes; returns their paths."""
        if self.config.attributes is not None:
            raise ValueError("value-steer knows only heads of one attribute, this one has several.")
        if self.config.architecture != "mlp" or self.config.projection_size is not None:
            raise ValueError("value-steer knows only mlp heads of the feature's width, this one is of another form.")
        if not self.config.reads_final_alone:
            raise ValueError("value-steer knows only heads on the final state, this one reads others, or remembers.")
        weights, sidecar = str(path), f"{path}.meta.json"
        Path(weights).parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.net.state_dict(), weights)
        meta = {"feature_spec": FEATURE, "threshold": self.config.threshold, "meta": self.config.training or {}}
        Path(sidecar).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        return weights, sidecar


def _values(logits: Tensor) -> Tensor:
    return logits.sigmoid().masked_fill(~logits.isfinite(), torch.nan)


def _margins(logits: Tensor, values: Tensor, attribute: Mapping[str, Any]) -> Tensor:
    """How far an attribute is beyond its threshold, on its undesirable side, in log odds; the shape of `logits`.

    Negative exactly where its value passes: the sign is that of the comparison which a head of this attribute alone
    would be steered by, not of a difference that rounds.
    """
    threshold, polarity = attribute["threshold"], attribute["polarity"]
    beyond = logits - (math.log(threshold) - math.log1p(-threshold))
    beyond = beyond if polarity == "undesirable" else -beyond
    passed = acceptable(values, values.new_full((), threshold), polarity)
    return torch.where(passed, beyond.clamp(max=-_LEAST_MARGIN), beyond.clamp(min=_LEAST_MARGIN))


register(ValueHeadConfig)
AutoModel.register(ValueHeadConfig, ValueHead)
