"""LLaVA-1.5 and LLaVA-NeXT: image features, their packing, and the merge into the prompt.

Liu et al. 2023 (arXiv 2310.03744) and the LLaVA-NeXT blog of January 2024; the numbers follow
transformers' `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`.  Submodule names
are the checkpoint's, less the prefixes in which the three key layouts differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minivlm.errors import UserError
from minivlm.model import anyres
from minivlm.model.clip import ClipVision
from minivlm.model.config import VLMConfig
from minivlm.model.llama import Cache, Llama


class Projector(nn.Module):
    """Vision channels -> decoder channels: linear, GELU (exact), linear."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        vision_size = config.vision.hidden_size * len(config.vision_feature_layers)
        self.linear_1 = nn.Linear(vision_size, config.text.hidden_size, bias=config.projector_bias)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Tower, projector and decoder of one checkpoint."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = ClipVision(config.vision, config.vision_feature_layers)
        self.multi_modal_projector = Projector(config)
        self.language_model = Llama(config.text)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.is_next:
            self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))

    def image_features(self, pixel_values: Tensor, image_sizes: Sequence[anyres.Size] | None = None) -> list[Tensor]:
        """One [N_i, C] tensor of decoder inputs per image, in prompt order.

        LLaVA-1.5: pixel_values [I, 3, s, s].  LLaVA-NeXT: [I, tiles, 3, s, s], the base view first and
        zero tiles behind an image that has fewer, with image_sizes the original (height, width) of each.
        """
        if not self.config.is_next:
            return list(self._project(pixel_values))
        counts = [anyres.num_tiles(size, self.config) for size in image_sizes]
        if pixel_values.shape[1] < max(counts):
            raise UserError(
                f"pixel_values hold {pixel_values.shape[1]} tiles, image_sizes {list(image_sizes)} ask for {counts}"
            )
        tiles = torch.cat([image[:count] for image, count in zip(pixel_values, counts)])
        features = self._project(tiles).split(counts)
        return [self._pack(tiles, size) for tiles, size in zip(features, image_sizes)]

    def _project(self, tiles: Tensor) -> Tensor:
        """[tiles, 3, s, s] -> [tiles, grid² (+ 1 for the CLS token if selected), C]."""
        features = self.vision_tower(tiles.to(self.lm_head.weight.dtype))
        if self.config.select_strategy == "default":
            features = features[:, 1:]
        return self.multi_modal_projector(features)

    def _pack(self, tiles: Tensor, image_size: anyres.Size) -> Tensor:
        """Base view, then the tiles as one unpadded picture whose rows each end in a newline: [N, C]."""
        side, channels = self.config.vision.grid, tiles.shape[-1]
        rows, cols = anyres.tile_grid(image_size, self.config)
        top, bottom, left, right = anyres.unpadded_box(image_size, (rows * side, cols * side))
        picture = tiles[1:].view(rows, cols, side, side, channels).transpose(1, 2)  # [rows, side, cols, side, C]
        picture = picture.reshape(rows * side, cols * side, channels)[top:bottom, left:right]
        newline = self.image_newline.expand(bottom - top, 1, channels)
        return torch.cat((tiles[0], torch.cat((picture, newline), dim=1).flatten(0, 1)))

    def embed(self, input_ids: Tensor, features: Sequence[Tensor] = ()) -> Tensor:
        """Token embeddings [B, S, C] with the image tokens of the batch, in order, replaced by `features`.

        Raises `UserError` when there are not as many image tokens as feature rows.
        """
        embeds = self.language_model.embed_tokens(input_ids)
        is_vision = input_ids == self.config.image_token_index
        rows = sum(len(f) for f in features)
        if int(is_vision.sum()) != rows:
            raise UserError(f"the prompt has {int(is_vision.sum())} image tokens, the images make {rows}")
        if features:
            embeds = embeds.masked_scatter(is_vision[..., None], torch.cat(list(features)).to(embeds.dtype))
        return embeds

    def forward(self, embeds: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Decoder hidden states [B, S', C] of embeddings [B, S, C] at `positions` [B, S]; logits are `lm_head` of a row."""
        return self.language_model(embeds, positions, cache)
