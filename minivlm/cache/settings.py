"""The settings of a KV policy: one dataclass, from which the command-line flags are made.

Flags keep the spelling of the A-VL authors' code, where `--vision_adaptive_attention_rate` is what is called
`vision_rate` here; both `--like_this` and `--like-this` work.  A preset (`--policy avl`) sets fields, explicit flags
override it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minivlm.cache.policies import random_vision, streaming
from minivlm.cache.policies.avl import AdaptiveFilter, AdaptiveVision, TextDirect, TextH2O, TextHistory
from minivlm.cache.policies.h2o import WholeCacheH2O
from minivlm.cache.policy import Policy, TokenBudget
from minivlm.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What `--policy NAME` stands for."""

    fields: dict[str, Any] = field(default_factory=dict)  # the settings it sets
    adapt: Callable[[Policy, float | None, int], Policy] | None = (
        None  # (policy of the flags, kv_budget, seed) -> policy
    )
    whole_cache: bool = False  # it decides over all entries, which excludes the parts for vision and for text
    needs_vision: bool = False


# A new policy is one file and one line here.
REGISTRY: dict[str, Preset] = {
    "full": Preset(),
    "avl": Preset(dict(vision=True, vision_rate=0.5, vision_compute_rate=0.7, vision_interval=3)),
    "h2o": Preset(dict(all_h2o=True)),
    "fastv": Preset(dict(filter=True, filter_layer=2, filter_rate=0.5)),
    "streaming": Preset(adapt=streaming.adapt, whole_cache=True),
    "random": Preset(dict(vision=True, vision_rate=0.5), adapt=random_vision.adapt, needs_vision=True),
}


def _flag(default: Any, name: str, kind: Callable, text: str) -> Any:
    return field(default=default, metadata=dict(flag=name, kind=kind, help=text))


@dataclass(frozen=True)
class CacheSettings:
    """A KV policy and its numbers.  Rates are shares removed, in [0, 1].

    `CacheSettings.preset("avl", vision_rate=0.75)` starts from a preset; the bare constructor from the full cache.
    Raises `UserError` for values out of range and for parts that exclude each other.
    """

    policy: str = "full"
    vision: bool = _flag(False, "vision_adaptive_attention", bool, "evict vision entries after prefill")
    vision_rate: float = _flag(0.5, "vision_adaptive_attention_rate", float, "share of the vision entries evicted")
    vision_compute_rate: float = _flag(
        0.6, "vision_adaptive_attention_compute_rate", float, "share of the vision entries left out of a core step"
    )
    vision_interval: int = _flag(
        -1,
        "vision_adaptive_attention_update_interval",
        int,
        "decode steps from one choice of the core to the next; <= 0: no core",
    )
    filter: bool = _flag(
        False, "prefill_filter_flag", bool, "stop computing the least attended vision tokens in prefill"
    )
    filter_layer: int = _flag(3, "prefill_filter_layer", int, "the first layer that sees only the survivors")
    filter_rate: float = _flag(0.5, "prefill_filter_rate", float, "share of the vision tokens that is dropped there")
    text: bool = _flag(False, "text_pruning_flag", bool, "evict text entries per head")
    text_rate: float = _flag(0.5, "text_pruning_rate", float, "share of the text entries evicted")
    text_init_cache: int = _flag(20, "text_init_cache", int, "text entries that always may stay")
    text_h2o: bool = _flag(True, "text_use_h2o", bool, "evict text by accumulated attention")
    text_hh_rate: float = _flag(0.7, "text_h20_hh_rate_in_cache", float, "share of the text budget for heavy hitters")
    text_direct: bool = _flag(
        False, "compare_text_direct_pruning", bool, "evict text by the last row alone (without text_use_h2o)"
    )
    all_h2o: bool = _flag(False, "all_use_h2o", bool, "H2O over the whole cache, vision and text alike")
    text_pruning_interval: int | None = _flag(
        None, "text_pruning_interval", int, "accepted, without effect: the budget holds at every step"
    )
    kv_budget: float | None = _flag(
        None, "kv_budget", float, "share of the prompt's KV bytes the policy may hold (sets its rate)"
    )
    score_window: int = _flag(1, "vision_score_window", int, "last prompt rows whose mean attention scores vision")
    seed: int = 0  # of the `random` policy; scripts fill it from --seed

    def __post_init__(self) -> None:
        if self.policy not in REGISTRY:
            raise UserError(f"--policy {self.policy!r} is unknown (expected {', '.join(REGISTRY)})")
        preset = REGISTRY[self.policy]
        flags = {f.name: "--" + f.metadata["flag"] for f in fields(self) if "flag" in f.metadata}
        for name in ("vision_rate", "vision_compute_rate", "filter_rate", "text_rate", "text_hh_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{flags[name]} is {getattr(self, name):g} (expected a share from 0 to 1)")
        for name, least in (("filter_layer", 1), ("text_init_cache", 0), ("score_window", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{flags[name]} is {getattr(self, name)} (expected at least {least})")
        if self.score_window > 128:
            raise UserError(f"--vision_score_window is {self.score_window} (expected at most 128 rows)")
        if self.text_direct and self.text_h2o and self.text:
            raise UserError("--compare_text_direct_pruning needs --text_use_h2o false: one rule evicts text, not two")
        parts = [flags[name] for name in ("vision", "filter", "text") if getattr(self, name)]
        if self.all_h2o and preset.whole_cache:
            raise UserError(f"{flags['all_h2o']} excludes --policy {self.policy}: both decide over the whole cache")
        whole = flags["all_h2o"] if self.all_h2o else f"--policy {self.policy}" if preset.whole_cache else None
        if whole and parts:
            raise UserError(f"{whole} decides over text and vision alike and excludes {parts[0]}")
        if preset.needs_vision and not self.vision:
            raise UserError(f"--policy {self.policy} without {flags['vision']} has nothing to choose")
        if self.kv_budget is not None:
            if not 0 < self.kv_budget <= 1:
                raise UserError(f"--kv_budget is {self.kv_budget:g} (expected a share above 0, up to 1)")
            if self.kv_budget < 1 and not (whole or self.vision or self.filter):
                raise UserError(
                    f"--kv_budget {self.kv_budget:g}: the full cache holds everything (choose a policy that evicts vision or all)"
                )

    @classmethod
    def preset(cls, policy: str, **changes: Any) -> CacheSettings:
        """The settings of a preset, with `changes` on top."""
        return cls(policy=policy, **{**(REGISTRY[policy].fields if policy in REGISTRY else {}), **changes})

    def build(self, num_layers: int) -> Policy:
        """The policy's parts for a decoder of `num_layers`; raises `UserError` if the filter lies outside of it."""
        if self.filter and self.filter_layer > num_layers:
            raise UserError(f"--prefill_filter_layer is {self.filter_layer}, the model has {num_layers} layers")
        vision = (
            AdaptiveVision(self.vision_rate, self.vision_compute_rate, self.vision_interval, self.kv_budget)
            if self.vision
            else None
        )
        # Where vision is evicted anyway, the budget is kept there and the filter keeps its rate.
        filter_budget = None if vision else self.kv_budget
        policy = Policy(
            name=self.policy,
            vision=vision,
            budget=self._budget(),
            filter=AdaptiveFilter(self.filter_layer, self.filter_rate, num_layers, filter_budget)
            if self.filter
            else None,
            window=self.score_window,
        )
        adapt = REGISTRY[self.policy].adapt
        return adapt(policy, self.kv_budget, self.seed) if adapt else policy

    def _budget(self) -> TokenBudget | None:
        if self.all_h2o:
            return WholeCacheH2O(0.5 if self.kv_budget is None else self.kv_budget)
        if not self.text:
            return None
        if self.text_h2o:
            return TextH2O(self.text_rate, self.text_init_cache, self.text_hh_rate)
        return (TextDirect if self.text_direct else TextHistory)(self.text_rate, self.text_init_cache)

    def notes(self, images: bool = True) -> list[str]:
        """One line for each setting that is legal but may not do what its user expects."""
        notes = []
        if self.text_pruning_interval is not None:
            notes.append("--text_pruning_interval has no effect: the text budget is applied at every step")
        if (
            self.vision
            and self.vision_interval > 0
            and self.vision_compute_rate <= self.vision_rate
            and self.kv_budget is None
        ):
            notes.append(
                f"compute rate {self.vision_compute_rate:g} <= rate {self.vision_rate:g}: the core is everything kept"
            )
        if not (self.vision or self.filter or self.text or self.all_h2o or REGISTRY[self.policy].whole_cache):
            notes.append(f"policy {self.policy!r} saves no bytes")
        if self.kv_budget is not None and not images and (self.vision or self.filter):
            notes.append("--kv_budget has no effect on a prompt without images: it is kept by evicting image entries")
        return notes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
