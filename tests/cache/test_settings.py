"""The settings of KV policies: flags in both spellings, presets and what overrides them, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from minivlm.app.cli import Parser
from minivlm.app.policy_flags import add_arguments, from_args
from minivlm.cache.policies import PRESETS, preset
from minivlm.cache.policies.avl import AdaptiveFilter, AdaptiveVision, AVLSettings, TextDirect, TextH2O, TextHistory
from minivlm.cache.policies.h2o import WholeCacheH2O
from minivlm.cache.policies.random_vision import RandomVision
from minivlm.cache.policies.streaming import Streaming, StreamingSettings
from minivlm.cache.policy import Policy
from minivlm.cache.settings import CacheSettings, flag_names
from minivlm.errors import UserError

# Every flag of the A-VL authors' code, with its default there.
ORIGINAL = {
    "vision_adaptive_attention": False,
    "vision_adaptive_attention_rate": 0.5,
    "vision_adaptive_attention_compute_rate": 0.6,
    "vision_adaptive_attention_update_interval": -1,
    "prefill_filter_flag": False,
    "prefill_filter_layer": 3,
    "prefill_filter_rate": 0.5,
    "text_pruning_flag": False,
    "text_pruning_rate": 0.5,
    "text_init_cache": 20,
    "text_use_h2o": True,
    "text_h20_hh_rate_in_cache": 0.7,
    "compare_text_direct_pruning": False,
    "all_use_h2o": False,
}
# The other flags of `AVLSettings`.
ADDED = {"text_pruning_interval": None, "kv_budget": None, "vision_score_window": 1}


def parse(line: str, seed: int = 0) -> CacheSettings:
    parser = Parser("")
    add_arguments(parser)
    return from_args(parser.parse_args(line.split()), seed)


def test_flags_and_defaults_are_the_originals():
    defaults = {flag: getattr(AVLSettings(), name) for name, flag in flag_names(AVLSettings).items()}
    assert defaults == {**ORIGINAL, **ADDED}
    assert parse("") == AVLSettings() == preset("full")


@pytest.mark.parametrize("flag", [*ORIGINAL, *ADDED])
def test_both_spellings_mean_the_same(flag):
    default = {**ORIGINAL, **ADDED}[flag]
    value = {bool: "false" if default else "true", float: "0.25", int: "7", type(None): "1"}[type(default)]
    lines = [f"--{spelling}{sep}{value}" for spelling in (flag, flag.replace("_", "-")) for sep in (" ", "=")]
    first, *others = map(parse, lines)
    assert all(settings == first for settings in others)
    flags, defaults = flag_names(AVLSettings), AVLSettings()
    assert [flags[name] for name in flags if getattr(first, name) != getattr(defaults, name)] == [flag]


@pytest.mark.parametrize("flag", [name for name, default in ORIGINAL.items() if isinstance(default, bool)])
def test_a_boolean_stands_alone_or_takes_a_word(flag):
    (name,) = [field for field, its_flag in flag_names(AVLSettings).items() if its_flag == flag]
    needed = "--text_use_h2o no " if flag == "compare_text_direct_pruning" else ""
    for word in ("", "true", "1", "YES"):
        assert getattr(parse(f"{needed}--{flag} {word}"), name) is True
    for word in ("false", "0", "No"):
        assert getattr(parse(f"{needed}--{flag} {word}"), name) is False
    for word in ("None", "off", "2", "''"):
        with pytest.raises(UserError, match="neither true nor false"):
            parse(f"--{flag} {word}")


def test_presets_and_what_overrides_them():
    avl = AVLSettings(policy="avl", vision=True, vision_rate=0.5, vision_compute_rate=0.7, vision_interval=3)
    assert parse("--policy avl") == avl
    assert parse("--policy fastv") == AVLSettings(policy="fastv", filter=True, filter_layer=2, filter_rate=0.5)
    assert parse("--policy h2o") == AVLSettings(policy="h2o", all_h2o=True)
    assert parse("--policy avl --vision_adaptive_attention_rate 0.75") == preset("avl", vision_rate=0.75)
    assert parse("--vision-adaptive-attention-rate=0.75 --policy avl") == preset("avl", vision_rate=0.75)
    text_alone = parse("--policy avl --vision_adaptive_attention false --text_pruning_flag")
    assert text_alone.build(4) == Policy("avl", budget=TextH2O(0.5, 20, 0.7))
    assert parse("--policy random", seed=5).seed == 5


def test_settings_become_the_parts_of_a_policy():
    expected = {
        "full": Policy("full"),
        "avl": Policy("avl", vision=AdaptiveVision(0.5, 0.7, 3)),
        "h2o": Policy("h2o", budget=WholeCacheH2O(0.5)),
        "fastv": Policy("fastv", filters=(AdaptiveFilter(2, 0.5, 4),)),
        "streaming": Policy("streaming", budget=Streaming(0.5)),
        "random": Policy("random", vision=RandomVision(0.5, 0.6, -1, seed=3)),
    }
    assert {name: preset(name, seed=3).build(4) for name in expected} == expected
    text = AVLSettings(text=True, text_rate=0.3, text_init_cache=4, text_hh_rate=0.2)
    assert text.build(4).budget == TextH2O(0.3, 4, 0.2)
    assert replace(text, text_h2o=False).build(4).budget == TextHistory(0.3, 4)
    assert replace(text, text_h2o=False, text_direct=True).build(4).budget == TextDirect(0.3, 4)
    assert preset("avl", text=True, filter=True, filter_layer=4, score_window=16).build(4) == Policy(
        "avl",
        vision=AdaptiveVision(0.5, 0.7, 3),
        budget=TextH2O(0.5, 20, 0.7),
        filters=(AdaptiveFilter(4, 0.5, 4),),
        window=16,
    )


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "full"])
def test_a_share_sets_the_rate_of_every_policy(name):
    policy = preset(name, kv_budget=0.125).build(4)
    part = policy.vision or policy.budget or policy.filters[0]
    assert 0.125 in (getattr(part, "kv_budget", None), getattr(part, "share", None))


_EXCLUDES = "--all_use_h2o decides over text and image alike and excludes"
_NOT_OF_STREAMING = "is not a setting of --policy streaming (expected --kv_budget)"
REFUSED = {
    "--policy turbo": "--policy 'turbo' is unknown (expected full, avl, h2o, fastv, streaming, random",
    "--all_use_h2o --vision_adaptive_attention": f"{_EXCLUDES} --vision_adaptive_attention",
    "--all_use_h2o --text_pruning_flag": f"{_EXCLUDES} --text_pruning_flag",
    "--all_use_h2o --prefill_filter_flag": f"{_EXCLUDES} --prefill_filter_flag",
    "--policy h2o --prefill_filter_flag": f"{_EXCLUDES} --prefill_filter_flag",
    "--policy streaming --text_pruning_flag": f"--text_pruning_flag {_NOT_OF_STREAMING}",
    "--policy streaming --all_use_h2o": f"--all_use_h2o {_NOT_OF_STREAMING}",
    "--policy random --vision_adaptive_attention false": (
        "--policy random without --vision_adaptive_attention has nothing to choose"
    ),
    "--text_pruning_flag --compare_text_direct_pruning": "--compare_text_direct_pruning needs --text_use_h2o false",
    "--prefill_filter_layer 0": "--prefill_filter_layer is 0 (expected at least 1)",
    "--text_init_cache -1": "--text_init_cache is -1 (expected at least 0)",
    "--vision_score_window 0": "--vision_score_window is 0 (expected at least 1)",
    "--vision_score_window 129": "--vision_score_window is 129 (expected at most 128 queries)",
    "--policy avl --kv_budget 0": "--kv_budget is 0 (expected a share above 0, up to 1)",
    "--policy avl --kv_budget 1.01": "--kv_budget is 1.01 (expected a share above 0, up to 1)",
    "--policy avl --kv_budget nan": "'nan' is not a finite number",
    "--kv_budget 0.5": "the full cache holds everything",
    "--text_pruning_flag --kv_budget 0.5": "the full cache holds everything",
    "--text_init_cache 2.5": "argument --text_init_cache/--text-init-cache: '2.5' is not an integer of at most 64 bits",
    "--text_pruning_rate half": "argument --text_pruning_rate/--text-pruning-rate: 'half' is not a finite number",
    **{
        f"--{flag} {rate}": f"--{flag} is {rate} (expected a share from 0 to 1)"
        for flag, default in ORIGINAL.items()
        if isinstance(default, float)
        for rate in ("-0.1", "1.5")
    },
    **{f"--vision_adaptive_attention_rate {rate}": f"'{rate}' is not a finite number" for rate in ("nan", "inf")},
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_is_said_in_one_line(line):
    with pytest.raises(UserError) as error:
        parse(line)
    assert REFUSED[line] in str(error.value) and "\n" not in str(error.value)


def test_a_rate_that_is_no_number_is_refused_without_flags_too():
    for name in ("vision_rate", "vision_compute_rate", "filter_rate", "text_rate", "text_hh_rate", "kv_budget"):
        with pytest.raises(UserError, match="is nan"):
            AVLSettings(**{name: float("nan")})


def test_the_filter_lies_inside_the_model():
    settings = AVLSettings(filter=True, filter_layer=5)
    assert settings.build(5).filters[0].layer == 5
    with pytest.raises(UserError, match="--prefill_filter_layer is 5, the model has 4 layers"):
        settings.build(4)


def test_extreme_rates_are_legal():
    for rate in (0.0, 1.0):
        names = ("vision_rate", "vision_compute_rate", "filter_rate", "text_rate", "text_hh_rate")
        AVLSettings(vision=True, filter=True, text=True, **dict.fromkeys(names, rate))


def test_notes_on_what_is_legal_but_may_surprise():
    nothing = "policy 'full' saves no bytes"
    assert AVLSettings().notes() == [nothing]
    assert parse("--text_pruning_interval 4").notes() == [
        "--text_pruning_interval has no effect: the text budget is applied at every step",
        nothing,
    ]
    all_core = "compute rate 0.5 <= rate 0.5: the core is everything kept"
    assert parse("--policy avl --vision_adaptive_attention_compute_rate 0.5").notes() == [all_core]
    without_interval = parse("--vision_adaptive_attention --vision_adaptive_attention_compute_rate 0.5")
    assert without_interval.notes() == []  # there is no core
    assert parse("--policy avl --vision_adaptive_attention no").notes() == ["policy 'avl' saves no bytes"]
    assert all(not preset(name).notes() for name in PRESETS if name != "full")
    text_alone = "--kv_budget has no effect on a prompt without images: it is kept by evicting image entries"
    assert parse("--policy avl --kv_budget 0.5").notes(images=False) == [text_alone]
    assert not parse("--policy avl --kv_budget 0.5").notes()
    assert not parse("--policy h2o --kv_budget 0.5").notes(images=False)


def test_settings_read_back_from_what_is_stored():
    settings = preset("avl", vision_rate=0.25, kv_budget=0.5, seed=4)
    assert AVLSettings(**settings.to_dict()) == settings
    assert StreamingSettings(**preset("streaming", kv_budget=0.25).to_dict()) == preset("streaming", kv_budget=0.25)
