"""LLaVA-1.5 and LLaVA-NeXT: image features, their packing, and the merge into the prompt.

Liu et al. 2023 (arXiv 2310.03744) and the LLaVA-NeXT blog post of January 2024. Results agree with
transformers' `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`. Submodules
are named as in checkpoints, without the prefixes in which the three key layouts differ (see
`weights/layout.py`).
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
from minivlm.transfer import to_device


class Projector(nn.Module):
    """From the vision tower's channels to the decoder's: linear, GELU (exact), linear."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        vision_size = config.vision.hidden_size * len(config.vision_feature_layers)
        self.linear_1 = nn.Linear(vision_size, config.text.hidden_size, bias=config.projector_bias)
        self.linear_2 = nn.Linear(config.text.hidden_size, config.text.hidden_size, bias=config.projector_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Vision tower, projector and decoder of one checkpoint."""

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
        """The decoder inputs [N_i, C] of each image, in prompt order.

        LLaVA-1.5 takes pixel_values [I, 3, s, s]. LLaVA-NeXT takes [I, tiles, 3, s, s], the base
        view first and zero tiles at the end of images that have fewer, and the original (height,
        width) of each image in pixels. Raises `UserError` if there are fewer tiles than the image
        sizes ask for.
        """
        if not self.config.is_next:
            return list(self._project(pixel_values))
        sizes = list(image_sizes or ())
        counts = [anyres.num_tiles(size, self.config) for size in sizes]
        if pixel_values.shape[1] < max(counts):
            raise UserError(f"pixel_values hold {pixel_values.shape[1]} tiles, image_sizes {sizes} ask for {counts}")
        # The tower sees the tiles of all images at once, without the zero tiles.
        tiles = torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
        features = self._project(tiles).split(counts)
        return [self._pack(image_tiles, size) for image_tiles, size in zip(features, sizes, strict=True)]

    def _project(self, tiles: Tensor) -> Tensor:
        """[tiles, 3, s, s] -> [tiles, grid², C]; [tiles, 1 + grid², C] with the class token."""
        features = self.vision_tower(tiles.to(self.lm_head.weight.dtype))
        if self.config.select_strategy == "default":
            features = features[:, 1:]  # without the class token
        return self.multi_modal_projector(features)

    def _pack(self, tiles: Tensor, image_size: anyres.Size) -> Tensor:
        """The features [tiles, grid², C] of one image -> its decoder inputs [N, C].

        The base view comes first, then the other tiles as one picture: without its padding, line by
        line, with a newline at the end of each line.
        """
        side, channels = self.config.vision.grid, tiles.shape[-1]
        grid_h, grid_w = anyres.tile_grid(image_size, self.config)
        picture = tiles[1:].view(grid_h, grid_w, side, side, channels)
        picture = picture.transpose(1, 2)  # [grid_h, side, grid_w, side, C]
        picture = picture.reshape(grid_h * side, grid_w * side, channels)
        top, bottom, left, right = anyres.unpadded_box(image_size, (grid_h * side, grid_w * side))
        picture = picture[top:bottom, left:right]
        newline = self.image_newline.expand(bottom - top, 1, channels)
        lines = torch.cat((picture, newline), dim=1)  # [lines, columns + 1, C]
        return torch.cat((tiles[0], lines.flatten(0, 1)))

    def embed(self, input_ids: Tensor, features: Sequence[Tensor] = (), is_vision: Tensor | None = None) -> Tensor:
        """Embeddings [B, S, C] of ids [B, S], with `features` [N_i, C] in place of image tokens.

        The features are those of all images of the batch, in order. `is_vision` (bool [B, S]) says
        where image tokens stand, and no one waits for a GPU if it is on the CPU; None: wherever the id
        is the image token's. A model can generate
        that id too: then it stands for no image and has an embedding, as any other. Raises
        `UserError` if the number of features is not that of the image tokens.
        """
        embeds = self.language_model.embed_tokens(input_ids)
        if is_vision is None:
            is_vision = input_ids == self.config.image_token_index
        vision, expected = int(is_vision.sum()), sum(len(image_features) for image_features in features)
        if vision != expected:
            raise UserError(f"the prompt has {vision} image tokens, the images make {expected}")
        if features:
            mask = to_device(is_vision, embeds.device)[..., None]
            embeds = embeds.masked_scatter(mask, torch.cat(list(features)).to(embeds.dtype))
        return embeds

    def forward(self, embeds: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Embeddings [B, S, C] at positions [B, S] -> hidden states [B, S', C].

        `lm_head` is left to the caller, who usually needs the logits of the last token only.
        """
        return self.language_model(embeds, positions, cache)
