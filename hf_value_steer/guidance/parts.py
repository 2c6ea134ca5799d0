"""The parts of a guidance module, as in arXiv 2605.11712; all shapes are `(..., width)` unless said otherwise."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Standardise(nn.Module):
    """States with mean and scale of the backbone's own taken off; as made, it changes nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return (states.float() - self.mean) / self.scale


def encoder(width: int, value_width: int, dropout: float) -> nn.Sequential:
    """`f_u` and `f_c`: from a state to value space."""
    return nn.Sequential(nn.Linear(width, value_width), nn.GELU(), nn.Dropout(dropout))


def projection(attention: nn.MultiheadAttention, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of its queries (0), keys (1) and values (2): of those from `first` up to `last`."""
    part = slice(first * attention.embed_dim, last * attention.embed_dim)
    return attention.in_proj_weight[part], attention.in_proj_bias[part]


def by_head(attention: nn.MultiheadAttention, projected: Tensor) -> Tensor:
    """From `(..., width)` to `(..., heads, dim)`."""
    return projected.view(*projected.shape[:-1], attention.num_heads, -1)


class PromptAttention(nn.Module):
    """The conditional path: `lambda * LN(CrossAttn(LN(f_c(h)), LN(f_c(h_prompt))))`.

    Args:
        width, value_width, heads, dropout: see [`GuidanceModuleConfig`].
    """

    def __init__(self, width: int, value_width: int, heads: int, dropout: float):
        super().__init__()
        self.encoder = encoder(width, value_width, dropout)
        nn.init.xavier_uniform_(self.encoder[0].weight, gain=0.1)  # type: ignore[arg-type]
        self.query_norm, self.prompt_norm = nn.LayerNorm(value_width), nn.LayerNorm(value_width)
        self.attention = nn.MultiheadAttention(value_width, heads, dropout)
        self.norm = nn.LayerNorm(value_width)
        self.weight = nn.Parameter(torch.tensor(3.0))

    def read(self, states: Tensor) -> Tensor:
        """Keys and values of a prompt: from `(rows, length, width)` to `(rows, length, 2 * value_width)`."""
        return F.linear(self.prompt_norm(self.encoder(states)), *projection(self.attention, 1, 3))

    def forward(self, states: Tensor, prompt: Tensor, prompt_mask: Tensor) -> Tensor:
        """The prompt's part of the values of some tokens.

        Args:
            states (`torch.FloatTensor` of shape `(rows, tokens, width)`).
            prompt (`torch.FloatTensor` of shape `(rows, length, 2 * value_width)`): of `read`.
            prompt_mask (`torch.BoolTensor` of shape `(rows, length)`): False where the prompt is padding.
        """
        query = F.linear(self.query_norm(self.encoder(states)), *projection(self.attention, 0, 1))
        queries, keys, contents = (
            by_head(self.attention, each).transpose(1, 2) for each in (query, *prompt.chunk(2, dim=-1))
        )
        seen, dropout = prompt_mask[:, None, None], self.attention.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(queries, keys, contents, attn_mask=seen, dropout_p=dropout)
        return self.weight * self.norm(self.attention.out_proj(attended.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class Discriminator(nn.Module):
    """D: the logit of a value, `Linear-GELU-Dropout-Linear`; positive is undesirable."""

    def __init__(self, value_width: int, dropout: float):
        super().__init__()
        self.first = nn.Linear(value_width, max(value_width // 2, 1))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(self.first.out_features, 1)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(self.dropout(F.gelu(self.first(value)))).squeeze(-1)  # type: ignore[no-any-return]

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient of the logit at `value`, without dropout, in closed form: no graph is needed to steer."""
        inner = self.first(value)
        density = (-inner.square() / 2).exp() / math.sqrt(2 * math.pi)
        slope = torch.special.ndtr(inner) + inner * density
        return (slope * self.last.weight[0]) @ self.first.weight  # type: ignore[no-any-return]


class BridgeGenerator(nn.Module):
    """K seeds attend to `C = [h; phi(delta_z)]`; `B = LN(h + gate * attended)`.

    Args:
        width, value_width, count, heads: see [`GuidanceModuleConfig`].
    """

    def __init__(self, width: int, value_width: int, count: int, heads: int):
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(count, width))  # seeds near zero would make K equal bridges
        self.lift = nn.Sequential(nn.Linear(value_width, width), nn.GELU(), nn.Linear(width, width))
        self.attention = nn.MultiheadAttention(width, heads)
        self.raw_gate = nn.Parameter(torch.tensor(-2.0))
        self.norm = nn.LayerNorm(width)

    @property
    def gate(self) -> Tensor:
        """Weight of what the seeds attended to, `()`, not negative; near zero as made."""
        return F.softplus(self.raw_gate)

    def questions(self) -> Tensor:
        """What the seeds ask of contexts, `(K, heads, width)`: a context's logit is its product with that.

        Queries and keys in one, since the seeds are constant; biases of keys are the same for all contexts.
        """
        query = by_head(self.attention, F.linear(self.seeds, *projection(self.attention, 0, 1)))
        keys = by_head(self.attention, projection(self.attention, 1, 2)[0].T)
        return torch.einsum("khd,whd->khw", query, keys) / math.sqrt(query.shape[-1])

    def attend(self, states: Tensor, delta: Tensor, questions: Tensor | None = None) -> Tensor:
        """`gate * softmax(Q C^T / sqrt(d)) C`, `(..., K, width)`; with `questions`, they are not computed anew."""
        context = torch.stack([states, self.lift(delta)], dim=-2)
        questions = self.questions() if questions is None else questions
        shares = torch.einsum("...cw,khw->...khc", context, questions).softmax(dim=-1)
        values = by_head(self.attention, F.linear(context, *projection(self.attention, 2, 3)))
        attended = torch.einsum("...khc,...chd->...khd", shares, values).flatten(-2)
        return self.gate * self.attention.out_proj(attended)  # type: ignore[no-any-return]

    def forward(self, states: Tensor, delta: Tensor, questions: Tensor | None = None) -> Tensor:
        """Bridges `(..., K, width)` of standardised states and corrections `(..., value_width)`."""
        return self.norm(states[..., None, :] + self.attend(states, delta, questions))  # type: ignore[no-any-return]
