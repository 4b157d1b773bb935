"""Random cases for comparing a KV cache with the plain re-statement of A-VL (avl_reference.py).

    case = random_case(seed)
    ref = run_reference(case)      # greedy, in float64; ref.tokens[turn] is the answer to a turn

Feed the same tokens to the cache under test and compare call by call up to `ref.first_tie(margin)`. A later turn begins
with the last token of the previous answer, which was never fed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from avl_reference import Reference, Settings
from minivlm.model.config import TextConfig, VisionConfig, VLMConfig
from minivlm.model.llava import Llava
from weights.layout import by_canonical_name

HEADS = ((2, 2), (4, 4), (4, 2), (4, 1), (6, 2))  # query heads, key/value heads
IMAGE_TOKEN = 47  # the last of the vocabulary
RATES = (0.0, 0.25, 0.3, 0.5, 0.5, 0.75, 0.8, 0.9, 1.0)
ALL_PARTS = Settings(vision=True, vision_interval=3, text="h2o", text_init_cache=4, prefill_filter=True, filter_layer=1)


@dataclass(frozen=True)
class StreamingBudget:
    """How many entries a streaming cache may hold, given how many tokens it has seen."""

    share: float
    fixed: int

    def __call__(self, seen: int) -> int:
        return int(seen * self.share) + self.fixed


@dataclass(frozen=True)
class Turn:
    """A user's message and the length of the answer to it."""

    token_ids: Tensor  # [S], with one image token per vision token
    images: tuple[Tensor, ...]  # the features [N_i, C] of each image
    answer: int  # tokens of the answer; the last of them is fed at the start of the next turn, or never


@dataclass(frozen=True)
class Case:
    """A conversation with a random model, under one group of settings."""

    seed: int
    model: Llava
    settings: Settings
    turns: tuple[Turn, ...] = field(repr=False)

    @torch.no_grad()
    def inputs(self, turn_idx: int, answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What a turn feeds: embeddings [S, C], and which of the S tokens are vision tokens.

        A later turn begins with the last token of the answer before it, `answers[turn_idx - 1]`.
        """
        turn = self.turns[turn_idx]
        unfed = answers[turn_idx - 1][-1:] if turn_idx else []
        ids = torch.cat((torch.tensor(unfed, dtype=torch.int64), turn.token_ids))
        return self.model.embed(ids[None], turn.images)[0], ids == IMAGE_TOKEN


def tiny_model(
    seed: int,
    layers: int = 3,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    hidden: int = 32,
    peak: float = 2.0,
    context: int = 512,
) -> Llava:
    """A LLaVA-1.5 with random weights in float32; attention logits have a standard deviation of about `peak`.

    In the language model's head the weights of the image token are zero, so no greedy answer contains one.
    """
    text = TextConfig(
        model_type="llama",
        vocab_size=IMAGE_TOKEN + 1,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        context_length=context,
    )
    vision = VisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    )
    config = VLMConfig(
        model_type="llava",
        text=text,
        vision=vision,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layers=(1,),
        select_strategy="default",
        projector_bias=True,
        image_grid_pinpoints=(),
        eos_token_ids=(2,),
        dtype="float32",
    )
    model = Llava(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in by_canonical_name(model.state_dict(), text).items():
        if weight.ndim < 2:
            weight.uniform_(0.5, 1.5, generator=generator)
        elif "embed_tokens" in name:
            weight.normal_(generator=generator)
        else:
            gain = peak if "q_proj" in name or "k_proj" in name else 1.0
            weight.normal_(0.0, (gain / weight[0].numel()) ** 0.5, generator=generator)
    model.lm_head.weight[IMAGE_TOKEN] = 0
    return model


def random_prompt(rng: random.Random, model: Llava, first: bool = True) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Token ids and image features: up to three images, with or without text before and between them, then text."""
    num_images = rng.choices((0, 1, 2, 3), weights=(2, 9, 3, 2) if first else (6, 4, 1, 0))[0]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    images = []
    ids = _random_text(rng, rng.choice((0, 1, 3, 8)) if num_images or not first else 0)
    for i in range(num_images):
        size = rng.randint(1, 40 if num_images == 1 else 20)
        images.append(torch.randn(size, model.config.text.hidden_size, generator=generator))
        ids += [IMAGE_TOKEN] * size
        ids += _random_text(rng, rng.choice((0, 1, 6)) if i + 1 < num_images else 0)
    ids += _random_text(rng, rng.choice((1, 2, 6, 15, 30, 60)))
    return torch.tensor(ids), tuple(images)


def _random_text(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(IMAGE_TOKEN) for _ in range(length)]


def random_settings(rng: random.Random, layers: int) -> Settings:
    """Each part on or off independently, at ordinary and extreme rates; sometimes a whole-cache policy instead."""

    def rate() -> float:
        return rng.choice(RATES) if rng.random() < 0.7 else round(rng.random(), 3)

    which = rng.random()
    if which < 0.08:
        return Settings(all_h2o=True)
    if which < 0.14:
        budgets = ((0.5, 0), (0.25, 4), (0.0, 24), (0.0, 3))
        return Settings(streaming=StreamingBudget(*rng.choice(budgets)))
    if which < 0.18:
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
    """The case of this seed. Without `turns` most cases have one turn, some two or three."""
    rng = random.Random(seed)
    layers = rng.randint(2, 4)
    shape = dict(heads=rng.choice(HEADS), head_dim=rng.choice((8, 16)), hidden=rng.choice((32, 48)))
    model = tiny_model(rng.randrange(2**31), layers, peak=rng.uniform(1, 3), **shape)
    settings = random_settings(rng, layers)
    count = rng.choices((1, 2, 3), weights=(7, 2, 1))[0]
    conversation = []
    for i in range(turns or count):
        ids, images = random_prompt(rng, model, first=i == 0)
        conversation.append(Turn(ids, images, answer=rng.choice((1, 3, 8, 16, 25))))
    return Case(seed, model, settings, tuple(conversation))


def run_reference(case: Case) -> Reference:
    """Run the re-statement greedily on a case; its `tokens` are the answers, one list for each turn."""
    ref = Reference(case.model, case.settings)
    ref.tokens = []
    for turn_idx, turn in enumerate(case.turns):
        ref.turn(*case.inputs(turn_idx, ref.tokens))
        ref.tokens.append(ref.generate(turn.answer))
    return ref


def prefill_reference(settings: Settings, tokens: str, model: Llava | None = None, seed: int = 0) -> Reference:
    """The re-statement after a prompt of random embeddings; each letter is a token, and `v` a vision token."""
    model = model or tiny_model(seed)
    ref = Reference(model, settings)
    embeds = torch.randn(len(tokens), model.config.text.hidden_size, generator=torch.Generator().manual_seed(seed))
    ref.prefill(embeds, [token == "v" for token in tokens])
    return ref
