from __future__ import annotations
from fuzzer.case import Family
NAMED: dict[str, Family] = {}
