"""The KV policies that come with the library, one file each, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minivlm.cache.policies.avl import AVLSettings
from minivlm.cache.policies.random_vision import RandomSettings
from minivlm.cache.policies.streaming import StreamingSettings
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What `--policy NAME` stands for: a settings class, and the values it starts from."""

    settings: type[CacheSettings]
    values: Mapping[str, Any] = field(default_factory=dict)


# A new policy is one file and one line here.
PRESETS: dict[str, Preset] = {
    "full": Preset(AVLSettings),
    "avl": Preset(AVLSettings, {"vision": True, "vision_rate": 0.5, "vision_compute_rate": 0.7, "vision_interval": 3}),
    "h2o": Preset(AVLSettings, {"all_h2o": True}),
    "fastv": Preset(AVLSettings, {"filter": True, "filter_layer": 2, "filter_rate": 0.5}),
    "streaming": Preset(StreamingSettings),
    "random": Preset(RandomSettings, {"vision": True, "vision_rate": 0.5}),
}


def preset(policy: str, *, presets: Mapping[str, Preset] = PRESETS, **changes: Any) -> CacheSettings:
    """The settings of a policy by name, with `changes` on top: `preset("avl", vision_rate=0.75)`.

    Raises `UserError` for an unknown name, for settings that the policy does not have, and for values out of range.
    """
    if policy not in presets:
        raise UserError(f"--policy {policy!r} is unknown (expected {', '.join(presets)})")
    chosen = presets[policy]
    unknown = sorted(changes.keys() - chosen.settings.__dataclass_fields__.keys())
    if unknown:
        raise UserError(f"policy {policy!r} has no setting {unknown[0]!r}")
    return chosen.settings(**{"policy": policy, **chosen.values, **changes})
