"""Random cases for comparing a KV cache with the plain re-statement of A-VL (avl_reference.py).

    case = random_case(seed)
    ref = run(case)                # greedy, in float64; ref.tokens[turn] are its answers

Feed the same tokens to the cache under test and compare call by call up to `ref.first_tie(margin)`.
A turn after the first begins with the answer's last token, which was never fed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl_reference import Reference, Settings
from minivlm.model.config import TextConfig, VisionConfig, VLMConfig
from minivlm.model.llava import Llava

HEADS = ((2, 2), (4, 4), (4, 2), (4, 1), (6, 2))  # query heads, key/value heads
RATES = (0.0, 0.25, 0.3, 0.5, 0.5, 0.75, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Budget:
    """Columns a streaming cache may hold once `seq` tokens were seen."""

    share: float
    fixed: int

    def __call__(self, seq: int) -> int:
        return int(seq * self.share) + self.fixed


@dataclass(frozen=True)
class Turn:
    """What a user says, and how long the answer is."""

    token_ids: Tensor  # [S], with one image token per vision token
    images: tuple[Tensor, ...]  # the features [N_i, C] of each image
    answer: int  # tokens; the last of them is fed at the start of the next turn, or never


@dataclass(frozen=True)
class Case:
    seed: int
    model: Llava
    settings: Settings
    turns: tuple[Turn, ...] = field(repr=False)

    def is_vision(self, turn: Turn) -> Tensor:
        return turn.token_ids == self.model.config.image_token_index  # [S]

    @torch.no_grad()
    def embeds(self, turn: Turn) -> Tensor:
        return self.model.embed(turn.token_ids[None], turn.images)[0]  # [S, C]


def tiny_model(
    seed: int,
    layers: int = 3,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    hidden: int = 32,
    peak: float = 2.0,
    context: int = 512,
) -> Llava:
    """A LLaVA-1.5 with random weights, float32; attention logits have a standard deviation of about `peak`.

    The head's row of the image token is zero, so no greedy answer contains one.
    """
    text = TextConfig(
        model_type="llama", vocab_size=48, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim, rms_norm_eps=1e-5,
        rope_theta=10000.0, context_length=context,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14,
        layer_norm_eps=1e-5, hidden_act="quick_gelu",
    )  # fmt: skip
    config = VLMConfig(
        model_type="llava", text=text, vision=vision, image_token_index=47, vision_feature_layers=(1,), select_strategy="default",
        projector_bias=True, image_grid_pinpoints=(), eos_token_ids=(2,), dtype="float32",
    )  # fmt: skip
    model = Llava(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.uniform_(0.5, 1.5, generator=generator)
        elif "embed_tokens" in name:
            weight.normal_(generator=generator)
        else:
            gain = peak if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(0.0, (gain / weight[0].numel()) ** 0.5, generator=generator)
    model.lm_head.weight[config.image_token_index] = 0
    return model


def random_prompt(rng: random.Random, model: Llava, first: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Token ids and image features: up to three images with or without text before and between them, then text."""
    counts = rng.choices((0, 1, 2, 3), weights=(2, 9, 3, 2) if first else (6, 4, 1, 0))[0]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    image_token, hidden = model.config.image_token_index, model.config.text.hidden_size
    ids, images = _text(rng, rng.choice((0, 1, 3, 8)) if counts or not first else 0, image_token), []
    for i in range(counts):
        size = rng.randint(1, 40 if counts == 1 else 20)
        images.append(torch.randn(size, hidden, generator=generator))
        ids += [image_token] * size
        ids += _text(rng, rng.choice((0, 1, 6)) if i + 1 < counts else 0, image_token)
    ids += _text(rng, rng.choice((1, 2, 6, 15, 30, 60)), image_token)
    return torch.tensor(ids), tuple(images)


def _text(rng: random.Random, length: int, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(length)]


def random_settings(rng: random.Random, layers: int) -> Settings:
    """Every part on or off by itself, at ordinary and at extreme rates; sometimes a whole-cache policy instead."""

    def rate() -> float:
        return rng.choice(RATES) if rng.random() < 0.7 else round(rng.random(), 3)

    kind = rng.random()
    if kind < 0.08:
        return Settings(all_h2o=True)
    if kind < 0.14:
        return Settings(streaming=rng.choice((Budget(0.5, 0), Budget(0.25, 4), Budget(0.0, 24), Budget(0.0, 3))))
    if kind < 0.18:
        return Settings(prefill_filter=True, filter_layer=min(2, layers), filter_rate=rate())
    return Settings(
        vision=rng.random() < 0.7,
        vision_rate=rate(),
        vision_compute_rate=rate(),
        vision_interval=rng.choice((-1, 0, 1, 2, 3, 3, 5)),
        score_window=rng.choice((1, 1, 1, 4, 16)),
        text=rng.choice((None, "h2o", "h2o", "direct", "history")),
        text_rate=rate(),
        text_init_cache=rng.choice((0, 4, 4, 4, 20)),
        text_hh_rate=rng.choice((0.0, 0.3, 0.7, 0.7, 1.0)),
        prefill_filter=rng.random() < 0.4,
        filter_layer=rng.randint(1, layers),
        filter_rate=rate(),
    )


def random_case(seed: int, turns: int | None = None) -> Case:
    """The case of this seed; most have one turn, unless `turns` says how many."""
    rng = random.Random(seed)
    layers = rng.randint(2, 4)
    shape = dict(heads=rng.choice(HEADS), head_dim=rng.choice((8, 16)), hidden=rng.choice((32, 48)))
    model = tiny_model(rng.randrange(2**31), layers, peak=rng.uniform(1, 3), **shape)
    settings = random_settings(rng, layers)
    count = rng.choices((1, 2, 3), weights=(7, 2, 1))[0]
    said = []
    for i in range(turns or count):
        ids, images = random_prompt(rng, model, first=i == 0)
        said.append(Turn(ids, images, answer=rng.choice((1, 3, 8, 16, 25))))
    return Case(seed, model, settings, tuple(said))


def run(case: Case) -> Reference:
    """The re-statement on a case, greedily; `.tokens` holds the answer to each turn."""
    ref = Reference(case.model, case.settings)
    ref.tokens = []
    for turn in case.turns:
        embeds, is_vision = case.embeds(turn), case.is_vision(turn).tolist()
        if ref.tokens:
            last = ref.tokens[-1][-1]
            embeds, is_vision = torch.cat((ref.embed([last]), embeds)), [False, *is_vision]
        ref.turn(embeds, is_vision)
        ref.tokens.append(ref.generate(turn.answer))
    return ref
