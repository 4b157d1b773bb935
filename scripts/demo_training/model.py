"""The demo's configuration, and its training forward pass with the auxiliary losses.

The modules are minivlm's own. What differs from inference: questions are packed under a block mask, the last layer is
computed for text rows only, and three auxiliary signals help early on: the tower names the characters in each patch,
an early decoder layer names the field and offset of each value patch, and one head of a middle layer points at the
patch that holds the next character (the last prompt token at all patches of the value).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.batches import CHARS, FIELDS, IGNORE, OFFSETS, Batch
from demo_training.text import BOS, EOS, IMAGE, PAD, VOCAB_SIZE
from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llama import rope_table, rotate
from minivlm.model.llava import Llava

LAYERS, FIELD_LAYER, POINTER_LAYER, POINTER_HEAD = 6, 2, 3, 0
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

CONFIG = {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_token_index": IMAGE,
    "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224]],
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "image_seq_length": 49,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "text_config": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "float16",
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 16,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    },
}


class _PackedAttention:
    """The decoder's "cache" in training: nothing is stored; shared rows are causal, text rows see their block."""

    def __init__(self, batch: Batch, shared: int) -> None:
        self.shared, self.pointer = shared, batch.pointer
        ids = batch.segment
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        block = (ids[:, :, None] == ids[:, None, :]) & causal  # [B, T, T]
        self.mask = torch.cat((block.new_ones(len(ids), length, shared), block), -1)[:, None]  # [B, 1, T, shared + T]
        self.pointer_loss = torch.zeros((), device=ids.device)
        self.image_mass = torch.zeros((), device=ids.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == POINTER_LAYER:
            self._point(q, k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        text = q.shape[2] - self.mask.shape[2]  # 0 where only text rows are asked
        out = [F.scaled_dot_product_attention(q[:, :, text:], k, v, self.mask)]
        if text:
            shared = [x[:, :, : self.shared] for x in (q, k, v)]
            out.insert(0, F.scaled_dot_product_attention(*shared, is_causal=True))
        return torch.cat(out, 2)

    def _point(self, q: Tensor, k: Tensor) -> None:
        head = POINTER_HEAD * k.shape[1] // q.shape[1]
        rows = q[:, POINTER_HEAD, self.shared :].float()  # [B, T, D]
        scores = rows @ k[:, head].float().transpose(1, 2) * q.shape[-1] ** -0.5
        logp = scores.masked_fill(~self.mask[:, 0], -torch.inf).log_softmax(-1)
        b, t, n, size = self.pointer
        self.pointer_loss = -(logp[b, t, n] / size).sum() / (1 / size).sum()

    def survivors(self, layer: int) -> None:
        return None


class DemoTrainer(nn.Module):
    """The checkpoint's model plus the auxiliary heads, which are not exported."""

    def __init__(self) -> None:
        super().__init__()
        self.config = VLMConfig.from_dict(CONFIG)
        self.llava = Llava(self.config)
        vision, hidden = self.config.vision.hidden_size, self.config.text.hidden_size
        self.reader = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, 2 * CHARS))
        self.whereabouts = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, FIELDS + OFFSETS))
        with torch.no_grad():
            decoder, tower = self.llava.language_model, self.llava.vision_tower.embeddings
            nn.init.normal_(decoder.embed_tokens.weight, std=0.3)
            nn.init.normal_(self.llava.image_newline, std=0.3)
            nn.init.normal_(self.llava.lm_head.weight, std=0.02)
            nn.init.normal_(tower.position_embedding.weight, std=0.1)
            nn.init.normal_(tower.class_embedding, std=0.1)
            for layer in decoder.layers:
                nn.init.zeros_(layer.self_attn.o_proj.weight)
                nn.init.zeros_(layer.mlp.down_proj.weight)

    def normalise(self, tiles: Tensor) -> Tensor:
        mean, std = (torch.tensor(x, device=tiles.device).view(3, 1, 1) for x in (MEAN, STD))
        return (tiles.float() / 255 - mean) / std

    def reading_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Stage 1: the tower alone, characters of every patch of the page."""
        tiles = self.normalise(batch.tiles)
        features = self.llava.vision_tower(tiles.flatten(0, 1))[:, 1:].unflatten(0, tiles.shape[:2])
        loss, right = self._read(self._grid(features, batch.size), self._grid_chars(batch))
        return loss, {"read": right}

    def _grid(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, G, grid², C] of G tiles -> [B, rows, cols, C], the unpadded picture; the base view is left out."""
        side = self.config.vision.grid
        rows, cols = anyres.tile_grid(size, self.config)
        top, bottom, left, right = anyres.unpadded_box(size, (rows * side, cols * side))
        picture = tiles[:, 1:].unflatten(2, (side, side)).unflatten(1, (rows, cols)).transpose(2, 3)
        return picture.flatten(3, 4).flatten(1, 2)[:, top:bottom, left:right]

    def _packed(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, G, grid², C] projected -> [B, N, C]: base view, then rows that each end in a newline."""
        grid = self._grid(tiles, size)
        newline = self.llava.image_newline.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
        return torch.cat((tiles[:, 0], torch.cat((grid, newline), 2).flatten(1, 2)), 1)

    def _grid_chars(self, batch: Batch) -> Tensor:
        """[B, rows, cols, 2] of `batch.chars`, which counts image tokens."""
        side = self.config.vision.grid
        rows, cols = anyres.tile_grid(batch.size, self.config)
        top, bottom, left, right = anyres.unpadded_box(batch.size, (rows * side, cols * side))
        return batch.chars[:, side * side :].unflatten(1, (bottom - top, right - left + 1))[:, :, :-1]

    def _read(self, features: Tensor, chars: Tensor) -> tuple[Tensor, float]:
        logits = self.reader(features).unflatten(-1, (2, CHARS))
        inked = (chars > 0) | (torch.rand_like(chars, dtype=torch.float32) < 0.1)  # few of the many blanks
        loss = F.cross_entropy(logits[inked].float(), chars[inked])
        patches = (chars > 0).any(-1)
        right = (logits.argmax(-1) == chars).all(-1)[patches].float().mean()
        return loss, right

    def answer_losses(self, batch: Batch, prefix: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stage 2: answer, pointer, whereabouts and reading losses, and what to log."""
        model, count = self.llava, len(batch.tiles)
        tiles = self.normalise(batch.tiles)
        features = model.vision_tower(tiles.flatten(0, 1))[:, 1:]
        projected = model.multi_modal_projector(features).unflatten(0, tiles.shape[:2])
        image = self._packed(projected, batch.size)  # [B, N, C]
        embed = model.language_model.embed_tokens
        start = embed(torch.tensor(prefix, device=image.device)).expand(count, -1, -1)
        hidden = torch.cat((start.to(image.dtype), image, embed(batch.tokens).to(image.dtype)), 1)
        shared = len(prefix) + image.shape[1]
        batch.pointer[2] += len(prefix)
        positions = torch.cat((torch.arange(shared, device=image.device).expand(count, -1), shared + batch.position), 1)
        attention = _PackedAttention(batch, shared)
        decoder = model.language_model
        rope = rope_table(positions, self.config.text, hidden.dtype)
        losses = {}
        for i, layer in enumerate(decoder.layers[:-1]):
            hidden = layer(hidden, rope, attention)
            if i + 1 == FIELD_LAYER:
                guess = self.whereabouts(hidden[:, len(prefix) : shared])
                losses["field"] = F.cross_entropy(
                    guess[..., :FIELDS].flatten(0, 1).float(), batch.field.flatten()
                ) + F.cross_entropy(guess[..., FIELDS:].flatten(0, 1).float(), batch.offset.flatten())
        hidden = self._text_rows(decoder.layers[-1], hidden, rope, attention)
        rows = batch.targets != IGNORE
        logits = model.lm_head(decoder.norm(hidden[rows])).float()
        targets = batch.targets[rows]
        losses["answer"] = F.cross_entropy(logits, targets)
        losses["pointer"] = attention.pointer_loss
        grid = self._grid(features.unflatten(0, tiles.shape[:2]), batch.size)
        losses["read"], right = self._read(grid, self._grid_chars(batch))
        wrong = torch.zeros_like(batch.targets, dtype=torch.float32)
        wrong[rows] = (logits.argmax(-1) != targets).float()
        # a turn is right when no character between its prompt and its end is wrong
        ends = F.pad((batch.targets[:, :-1] != IGNORE) & (batch.targets[:, 1:] == IGNORE), (0, 1))
        turn = F.pad(ends.long().cumsum(1), (1, 0))[:, :-1]
        errors = torch.zeros(count, int(turn.max()) + 1, device=image.device).scatter_add_(1, turn, wrong)
        length = torch.zeros_like(errors).scatter_add_(1, turn, rows.float())
        exact = (errors == 0).float()
        return losses, {
            "read": right,
            "short": exact[(length > 0) & (length <= 40)].mean(),
            "long": exact[length > 40].sum() / (length > 40).sum().clamp(min=1),
        }

    @staticmethod
    def _text_rows(
        layer: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], attention: _PackedAttention
    ) -> Tensor:
        """The last layer, computed for the text rows only: nothing reads its image rows."""
        a, length = layer.self_attn, attention.mask.shape[2]
        x = layer.input_layernorm(hidden)
        split = lambda y: y.unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
        q = rotate(split(a.q_proj(x[:, -length:])), tuple(r[:, :, -length:] for r in rope))
        out = attention.attend(layer.layer_idx, q, rotate(split(a.k_proj(x)), rope), split(a.v_proj(x)))
        return layer.after(hidden[:, -length:], out)
