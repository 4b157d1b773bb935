"""The settings of a KV policy: plain numbers in a frozen dataclass, from whose fields the command-line flags are made.

Every policy has its own subclass of `CacheSettings`, in the policy's file: it adds the policy's numbers and builds its
parts. Flags keep the spelling of the A-VL authors' code where they come from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from minivlm.cache.policy import Policy
from minivlm.errors import UserError


def setting(default: Any, text: str, *, flag: str | None = None, value_type: type | None = None) -> Any:
    """A field of a settings class that becomes a command-line flag.

    `text` is its help. The flag is called like the field unless `flag` says otherwise; its values have the type of
    the default unless `value_type` says otherwise (it has to where the default is None).
    """
    return field(default=default, metadata={"flag": flag, "type": value_type or type(default), "help": text})


@dataclass(frozen=True, kw_only=True)
class CacheSettings(ABC):
    """What the settings of all policies have in common; each policy's own class extends it.

    Raises `UserError` for values that are out of range.
    """

    policy: str  # the name
    kv_budget: float | None = setting(
        None, "share of the prompt's KV bytes that the policy may hold (sets its rate)", value_type=float
    )
    seed: int = 0  # of whatever a policy draws at random

    def __post_init__(self) -> None:
        if self.kv_budget is not None and not 0 < self.kv_budget <= 1:
            raise UserError(f"--kv_budget is {self.kv_budget:g} (expected a share above 0, up to 1)")

    @abstractmethod
    def build(self, num_layers: int) -> Policy:
        """The policy's parts for a decoder of `num_layers`; raises `UserError` if they do not fit it."""

    def notes(self, images: bool = True) -> list[str]:
        """A line for each setting that is legal but may surprise, on a prompt with or without images."""
        return []

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def flag_names(settings: type[CacheSettings]) -> dict[str, str]:
    """The fields of a settings class that are flags, and the flags' names without dashes."""
    return {f.name: f.metadata["flag"] or f.name for f in fields(settings) if "flag" in f.metadata}
