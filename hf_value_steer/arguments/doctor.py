"""What `doctor` is told."""

from dataclasses import dataclass, field

from hf_value_steer.arguments.base import Arguments
from hf_value_steer.arguments.kinds import Candidates
from hf_value_steer.choices import Dtype


@dataclass(kw_only=True)
class DoctorArguments(Arguments):
    """What is examined."""

    model: str | None = field(
        default=None, metadata={"help": "Hub id or folder of a causal language model", "positional": True}
    )
    vllm: bool = field(default=False, metadata={"help": "check the installed vLLM instead of a model"})
    value_head: str | None = field(default=None, metadata={"help": "Hub id or folder of a value head"})
    num_candidates: Candidates = field(default=8, metadata={"help": "candidates of a step"})
    dtype: Dtype = field(default="auto", metadata={"help": "dtype of the model; auto: that of the checkpoint"})
    device: str | None = field(
        default=None, metadata={"help": 'a `device_map`, such as "cuda:0" or "auto"; cuda by default if there is one'}
    )
    json: bool = field(default=False, metadata={"help": "print JSON instead of a table"})

    def check(self) -> None:
        if self.vllm == (self.model is not None):
            raise ValueError("Pass a model, or `vllm`.")
