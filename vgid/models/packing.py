"""Samples with the same beginning share its tokens: exact, and several times cheaper.

Samples are laid out as trees: each token stands once, behind the tokens that it continues, sees its
ancestors only, and has the position that it has in its own sample. Trees lie side by side in a row.
Shape legend: B rows, L tokens of a row, A position axes, N samples, R response tokens over all
samples, D hidden width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded
from vgid.models.tree_attention import TREES, lay_out
from vgid.models.vision import Picture

MAX_ROW_TOKENS = 4096
"""Token budget of a row: a larger tree is cut, its beginning repeated, but no sample is."""


# Two questions about one portrait, `i i Q a` and `i i Q b c` (i: image tokens), are one row of six:
#
#     token      i  i  Q  a  b  c
#     position   0  1  2  3  3  4       as in the question's own sequence
#     ends       6  6  6  4  6  6       a token is seen by those from itself up to there
#     paths      0 1 2 3  and  0 1 2 4 5
#
# Both read the portrait's states, which are most of the work; neither sees the other's words.
@dataclass
class Packed:
    """N samples as model inputs."""

    ids_BL: Tensor  # token ids, padded
    positions_ABL: Tensor
    ends_BL: Tensor  # end of the tree below each token; padding is a tree without branches
    pictures: list[Picture] = field(repr=False)  # in the order of their image tokens
    rows: list[int] = field(repr=False)  # of each sample
    paths: list[list[int]] = field(repr=False)  # places of its tokens in the row, response included
    responses: list[list[int]] = field(repr=False)  # empty lists without

    @property
    def mask_B1LL(self) -> Tensor:
        """True where the token of the third axis sees that of the fourth."""
        place_L = torch.arange(self.ids_BL.shape[1], device=self.ids_BL.device)
        before_LL = place_L[None, :] <= place_L[:, None]
        return (before_LL & (place_L[:, None] < self.ends_BL[:, None, :]))[:, None]

    @property
    def response_ids_R(self) -> Tensor:
        """The response tokens of all samples, one after the other."""
        return torch.tensor([i for r in self.responses for i in r], device=self.ids_BL.device)

    @property
    def predicting_places(self) -> tuple[list[int], list[int]]:
        """Rows and places of the tokens that predict a response token, one after the other."""
        rows, places = [], []
        for row, path, response in zip(self.rows, self.paths, self.responses, strict=True):
            rows += [row] * len(response)
            # A token is predicted by the one before it.
            places += path[len(path) - len(response) - 1 : -1] if response else []
        return rows, places

    @property
    def last_places(self) -> tuple[list[int], list[int]]:
        """Row and place of each sample's last token."""
        return self.rows, [path[-1] for path in self.paths]

    def predicting(self, states_BLD: Tensor) -> Tensor:
        """The states that predict a response token, one after the other: (R, D)."""
        return states_BLD[self.predicting_places]


def pack(
    backbone: Backbone,
    prompts: Sequence[Encoded],
    responses: Sequence[Sequence[int]] | None = None,
    max_row_tokens: int = MAX_ROW_TOKENS,
    trees: Sequence[tuple[list[int], int]] | None = None,
) -> Packed:
    """Lay samples out as trees, responses behind their prompts, on the backbone's device.

    Given ``trees`` (samples, and the tokens that they take) are rows as they are, in their order.
    """
    answers = [list(r) for r in responses] if responses is not None else [[] for _ in prompts]
    keys = [prompt.identity + answer for prompt, answer in zip(prompts, answers, strict=True)]
    if trees is None:
        trees = _trees(prompts, keys, max_row_tokens)
        bins = _fill_rows([tokens for _, tokens in trees], max_row_tokens)
    else:
        bins = [[t] for t in range(len(trees))]
    length = max((sum(trees[t][1] for t in row) for row in bins), default=0)
    axes = prompts[0].positions_AL.shape[0] if prompts else 1
    ids_BL = np.full((len(bins), length), backbone.processor.tokenizer.pad_token_id)
    positions_ABL = np.zeros((axes, len(bins), length), dtype=np.int64)
    ends_BL = np.full((len(bins), length), length)
    packed_rows = [0] * len(prompts)
    packed_paths: list[list[int]] = [[] for _ in prompts]
    pictures: list[Picture] = []
    for b, row in enumerate(bins):
        used = 0
        for t in row:
            path: list[int] = []
            before: list[int] = []
            for n in trees[t][0]:
                prompt, answer = prompts[n], answers[n]
                shared = beginning(before, keys[n])
                # What the new one does not continue ends here: samples are in lexicographic order.
                ends_BL[b, path[shared:]] = used
                new = slice(used, used + len(keys[n]) - shared)
                ids_BL[b, new] = (prompt.prompt_ids + answer)[shared:]
                positions_ABL[:, b, new] = _continued(prompt, len(answer))[:, shared:]
                pictures += _new_pictures(prompt, shared)
                path = path[:shared] + list(range(new.start, new.stop))
                used, before = new.stop, keys[n]
                packed_rows[n], packed_paths[n] = b, path
            ends_BL[b, path] = used
    ids, positions, ends = (
        torch.from_numpy(array).to(backbone.device) for array in (ids_BL, positions_ABL, ends_BL)
    )
    return Packed(ids, positions, ends, pictures, packed_rows, packed_paths, answers)


def hidden_states(backbone: Backbone, packed: Packed, cache: Any | None = None) -> Tensor:
    """Last hidden states (after the final norm) of all tokens: (B, L, D); fills a cache."""
    model = backbone.model
    embedded_BLD = model.get_input_embeddings()(packed.ids_BL)
    if packed.pictures:
        features = torch.cat([backbone.vision.features(picture) for picture in packed.pictures])
        image_BL1 = (packed.ids_BL == backbone.processor.image_token_id)[..., None]
        embedded_BLD = embedded_BLD.masked_scatter(image_BL1, features.to(embedded_BLD.dtype))
    language_model = model.model.language_model
    seen: dict[str, Any]
    if language_model.config._attn_implementation == TREES:
        trees = lay_out(packed.ends_BL, embedded_BLD.dtype)
        # Four axes, so that transformers makes no mask of its own.
        seen = {"attention_mask": packed.ends_BL[:, None, None], "trees": trees}
    else:
        seen = {"attention_mask": packed.mask_B1LL}
    output = language_model(
        inputs_embeds=embedded_BLD,
        **seen,
        position_ids=rotary_positions(packed.positions_ABL),
        use_cache=cache is not None,
        cache=cache,
    )
    hidden_BLD: Tensor = output.last_hidden_state
    return hidden_BLD


def response_hidden(
    backbone: Backbone, prompts: Sequence[Encoded], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Last hidden states that predict a response token, sample after sample: (R, D)."""
    packed = pack(backbone, prompts, responses)
    return packed.predicting(hidden_states(backbone, packed))


def rotary_positions(positions_ABL: Tensor) -> Tensor:
    """Position ids as the language model takes them: without an axis of one."""
    return positions_ABL[0] if positions_ABL.shape[0] == 1 else positions_ABL


def beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two sequences."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def _continued(prompt: Encoded, tokens: int) -> Any:
    positions_AL = prompt.positions_AL.numpy()
    more = positions_AL[:, -1:] + np.arange(1, tokens + 1)
    return np.concatenate([positions_AL, more], axis=1)


def _new_pictures(prompt: Encoded, shared: int) -> list[Picture]:
    old = sum(key < 0 for key in prompt.identity[:shared])
    pictures = []
    for picture in prompt.pictures:
        if old >= picture.tokens:
            old -= picture.tokens
        else:
            assert old == 0, "an image is shared as a whole"
            pictures.append(picture)
    return pictures


def _trees(
    prompts: Sequence[Encoded], keys: Sequence[Sequence[int]], max_tokens: int
) -> list[tuple[list[int], int]]:
    """Samples with the same first image, as many as the budget holds; and the tokens laid out."""
    groups: dict[str, list[int]] = {}
    for n, prompt in enumerate(prompts):
        groups.setdefault(prompt.pictures[0].key if prompt.pictures else "", []).append(n)
    trees = []
    for members in groups.values():
        tree: list[int] = []
        tokens = 0
        before: Sequence[int] = []
        for n in sorted(members, key=lambda n: (keys[n], n)):
            grown = tokens + len(keys[n]) - beginning(before, keys[n])
            if tree and grown > max_tokens:
                trees.append((tree, tokens))
                tree, grown = [], len(keys[n])
            tree.append(n)
            tokens, before = grown, keys[n]
        trees.append((tree, tokens))
    return trees


def _fill_rows(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Trees of each row: as few rows as can be, evenly filled, the largest trees first."""
    capacity = max(max_tokens, *sizes, 1)
    count = math.ceil(sum(sizes) / capacity)
    while True:
        rows: list[list[int]] = [[] for _ in range(count)]
        used = [0] * count
        for t in sorted(range(len(sizes)), key=lambda t: -sizes[t]):
            # Longest first into the emptiest row: little padding, which is computed as well.
            row = used.index(min(used))
            rows[row].append(t)
            used[row] += sizes[t]
        if max(used, default=0) <= capacity:
            return rows
        count += 1
