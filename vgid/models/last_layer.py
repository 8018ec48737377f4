"""The last decoder layer where its states are read, and nowhere else.

Of the last layer's states only few are ever used: those that predict a token. The others matter to
no later token, since there is no later layer; only their keys and values do. So attention runs on
all tokens, and everything behind it on those that are read. In a model of few layers that saves a
tenth of a forward pass or more.

Shape legend: B rows, L tokens of a row, M places that are read, D hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class _LastLayer(nn.Module):
    """A pre-norm decoder layer (Llama's, Qwen2's), its feed-forward part at some places only."""

    def __init__(self, layer: Any, rows: Sequence[int], places: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.rows, self.places = list(rows), list(places)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """From (B, L, D) to (1, M, D); ``kwargs`` are the attention's."""
        layer = self.layer
        attended_BLD, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(hidden_states), **kwargs
        )
        read_MD = (hidden_states + attended_BLD)[self.rows, self.places]
        output_MD: Tensor = read_MD + layer.mlp(layer.post_attention_layernorm(read_MD))
        return output_MD[None]


@contextmanager
def reading_at(language_model: Any, rows: Sequence[int], places: Sequence[int]) -> Iterator[None]:
    """Inside, the language model's last hidden states are those of these places: (1, M, D).

    Args:
        language_model: of Llama's or Qwen2's build.
        rows: the row of each place.
        places: the token's number in its row.
    """
    layers = language_model.layers
    whole = layers[-1]
    layers[-1] = _LastLayer(whole, rows, places)
    try:
        yield
    finally:
        layers[-1] = whole
