"""The demo's configuration, and its training forward pass with the auxiliary losses.

The modules are minivlm's own. Training differs from inference in three ways. Questions are packed
under a block mask. The last layer is computed for text tokens only. And three auxiliary signals
help early on: the tower names the characters in each patch; an early decoder layer names the field
and offset of each value patch; and one head of a middle layer points at the patch with the next
character (the last prompt token, at all patches of the value).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demo_training.batches import CHARS, FIELDS, IGNORE, OFFSETS, Batch
from demo_training.text import BOS, EOS, IMAGE, PAD, VOCAB_SIZE
from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llama import rope_table
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
    """Takes the place of the decoder's cache in training, and stores nothing.

    The first `shared` tokens (prefix and image) are causal. A text token attends to them and to its
    own segment. `pointer` is that of `Batch`, with n counted from the start of the sequence.
    """

    def __init__(self, segment: Tensor, pointer: Tensor, shared: int) -> None:
        self.shared, self.pointer = shared, pointer
        length = segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        block = (segment[:, :, None] == segment[:, None, :]) & causal  # [B, T, T]
        visible = block.new_ones(len(segment), length, shared)
        self.mask = torch.cat((visible, block), -1)[:, None]  # [B, 1, T, shared + T]
        self.pointer_loss = torch.zeros((), device=segment.device)

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [B, H, S, D]; in the last layer q has the text tokens only."""
        if layer_idx == POINTER_LAYER:
            self._point(q, k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        text = q.shape[2] - self.mask.shape[2]  # 0 if q has the text tokens only
        out = [F.scaled_dot_product_attention(q[:, :, text:], k, v, self.mask)]
        if text:
            shared = [x[:, :, : self.shared] for x in (q, k, v)]
            out.insert(0, F.scaled_dot_product_attention(*shared, is_causal=True))
        return torch.cat(out, 2)

    def _point(self, q: Tensor, k: Tensor) -> None:
        """Set the pointer loss: how far one head's attention is from where it should look."""
        head = POINTER_HEAD * k.shape[1] // q.shape[1]
        queries = q[:, POINTER_HEAD, self.shared :].float()  # [B, T, D]
        scores = queries @ k[:, head].float().transpose(1, 2) * q.shape[-1] ** -0.5
        logp = scores.masked_fill(~self.mask[:, 0], -torch.inf).log_softmax(-1)
        b, t, n, count = self.pointer
        self.pointer_loss = -(logp[b, t, n] / count).sum() / (1 / count).sum()

    def survivors(self, layer_idx: int) -> None:
        return None


class DemoTrainer(nn.Module):
    """The model of the checkpoint, and auxiliary heads that are not exported."""

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

    def reading_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1: the vision tower alone names the characters in every patch of the page."""
        tiles = self.normalise(batch.tiles)
        features = self.llava.vision_tower(tiles.flatten(0, 1))[:, 1:].unflatten(0, tiles.shape[:2])
        loss, right = self._read(self._grid(features, batch.size), self._grid_chars(batch))
        return loss, {"read": right}

    def _grid(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """Assemble tiles [B, G, grid², C], but the base view, into a picture [B, rows, cols, C]."""
        side = self.config.vision.grid
        rows, cols = anyres.tile_grid(size, self.config)
        top, bottom, left, right = anyres.unpadded_box(size, (rows * side, cols * side))
        picture = tiles[:, 1:].unflatten(2, (side, side)).unflatten(1, (rows, cols)).transpose(2, 3)
        return picture.flatten(3, 4).flatten(1, 2)[:, top:bottom, left:right]

    def _packed(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """Image tokens [B, N, C] of projected tiles [B, G, grid², C], with newlines after rows."""
        grid = self._grid(tiles, size)
        newline = self.llava.image_newline.to(grid.dtype).expand(*grid.shape[:2], 1, -1)
        return torch.cat((tiles[:, 0], torch.cat((grid, newline), 2).flatten(1, 2)), 1)

    def _grid_chars(self, batch: Batch) -> Tensor:
        """The part of `batch.chars` that lies on the grid, [B, rows, cols, 2]."""
        side = self.config.vision.grid
        rows, cols = anyres.tile_grid(batch.size, self.config)
        top, bottom, left, right = anyres.unpadded_box(batch.size, (rows * side, cols * side))
        return batch.chars[:, side * side :].unflatten(1, (bottom - top, right - left + 1))[:, :, :-1]

    def _read(self, features: Tensor, chars: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of naming each patch's characters, and the share of patches that are right."""
        logits = self.reader(features).unflatten(-1, (2, CHARS))
        inked = (chars > 0) | (torch.rand_like(chars, dtype=torch.float32) < 0.1)  # only some of the many blanks
        loss = F.cross_entropy(logits[inked].float(), chars[inked])
        patches = (chars > 0).any(-1)
        right = (logits.argmax(-1) == chars).all(-1)[patches].float().mean()
        return loss, right

    def answer_losses(self, batch: Batch, prefix: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stage 2: the losses "field", "answer", "pointer" and "read", and what to log besides."""
        model = self.llava
        tiles = self.normalise(batch.tiles)
        features = model.vision_tower(tiles.flatten(0, 1))[:, 1:]
        projected = model.multi_modal_projector(features).unflatten(0, tiles.shape[:2])
        image = self._packed(projected, batch.size)  # [B, N, C]
        text, field_loss, pointer_loss = self._decode(batch, image, prefix)
        is_target = batch.targets != IGNORE
        logits = model.lm_head(model.language_model.norm(text[is_target])).float()
        targets = batch.targets[is_target]
        grid = self._grid(features.unflatten(0, tiles.shape[:2]), batch.size)
        read_loss, right = self._read(grid, self._grid_chars(batch))
        losses = {
            "field": field_loss,
            "answer": F.cross_entropy(logits, targets),
            "pointer": pointer_loss,
            "read": read_loss,
        }
        wrong = torch.zeros_like(batch.targets, dtype=torch.float32)
        wrong[is_target] = (logits.argmax(-1) != targets).float()
        return losses, {"read": right, **_shares_without_mistake(wrong, is_target)}

    def _decode(self, batch: Batch, image: Tensor, prefix: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Run the decoder.

        Returns the hidden states of the text [B, T, C], the field loss and the pointer loss.
        """
        decoder = self.llava.language_model
        count = len(image)
        start = decoder.embed_tokens(torch.tensor(prefix, device=image.device)).expand(count, -1, -1)
        text = decoder.embed_tokens(batch.tokens)
        hidden = torch.cat((start.to(image.dtype), image, text.to(image.dtype)), 1)
        shared = len(prefix) + image.shape[1]
        shared_positions = torch.arange(shared, device=image.device).expand(count, -1)
        positions = torch.cat((shared_positions, shared + batch.position), 1)
        rope = rope_table(positions, self.config.text, hidden.dtype)
        offset = torch.tensor([[0], [0], [len(prefix)], [0]], device=image.device)
        attention = _PackedAttention(batch.segment, batch.pointer + offset, shared)
        field_loss = torch.zeros((), device=image.device)
        for i, layer in enumerate(decoder.layers[:-1], 1):
            hidden = layer(hidden, rope, attention)
            if i == FIELD_LAYER:
                field_loss = self._field_loss(hidden[:, len(prefix) : shared], batch)
        text = self._text_only(decoder.layers[-1], hidden, rope, attention)
        return text, field_loss, attention.pointer_loss

    def _field_loss(self, image: Tensor, batch: Batch) -> Tensor:
        """The loss of naming the field and the offset of each image token [B, N, C]."""
        guess = self.whereabouts(image)
        field = guess[..., :FIELDS].flatten(0, 1).float()
        offset = guess[..., FIELDS:].flatten(0, 1).float()
        field_loss = F.cross_entropy(field, batch.field.flatten())
        return field_loss + F.cross_entropy(offset, batch.offset.flatten())

    @staticmethod
    def _text_only(
        layer: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], attention: _PackedAttention
    ) -> Tensor:
        """Run the last layer for the text tokens only: nothing reads its image tokens."""
        length = attention.mask.shape[2]
        q, k, v = layer.before(hidden, rope)
        out = attention.attend(layer.layer_idx, q[:, :, -length:], k, v)
        return layer.after(hidden[:, -length:], out)


def _shares_without_mistake(wrong: Tensor, is_target: Tensor) -> dict[str, Tensor]:
    """The shares of short and of long answers whose characters are all right.

    `wrong` [B, T] is 1 for a target that was missed; `is_target` [B, T] says which tokens have a
    target.
    """
    ends = F.pad(is_target[:, :-1] & ~is_target[:, 1:], (0, 1))  # the last target of each answer
    answer = F.pad(ends.long().cumsum(1), (1, 0))[:, :-1]  # the number of the answer that a token belongs to
    mistakes = torch.zeros(len(wrong), int(answer.max()) + 1, device=wrong.device).scatter_add_(1, answer, wrong)
    length = torch.zeros_like(mistakes).scatter_add_(1, answer, is_target.float())
    exact = (mistakes == 0).float()
    return {
        "short": exact[(length > 0) & (length <= 40)].mean(),
        "long": exact[length > 40].sum() / (length > 40).sum().clamp(min=1),
    }
