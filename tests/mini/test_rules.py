"""Rules: one place, each with its release."""

import dataclasses

import pytest

from vllm_trace.mini.rules import KNOWN_RELEASES, Rules, rules_for


def version(release):
    return tuple(map(int, release.split(".")))


def changed(before, after):
    one, other = dataclasses.asdict(rules_for(before)), dataclasses.asdict(rules_for(after))
    return {name for name in one if one[name] != other[name]} - {"release"}


def test_each_release_changes_what_its_rules_say():
    assert changed("0.8.5", "0.9.2") == {"free_tail_first", "one_position_left"}
    assert changed("0.9.2", "0.11.0") == set()
    assert changed("0.11.0", "0.11.2") == set()
    assert changed("0.11.2", "0.20.2") == {"whole_sequence_admission"}
    assert {
        "unhashed_blocks_first",
        "watermark",
        "fixed_hash_seed",
        "sparse_window_cache",
    } <= changed("0.20.2", "0.32.0")
    assert changed("0.32.0", "0.33.0") == {
        "null_block_counted",
        "null_head_freed",
        "self_preempted_goes_on",
        "output_caches_processed",
    }


def test_every_rule_has_a_known_release_and_a_sentence():
    for rule in dataclasses.fields(Rules)[1:]:
        release = rule.metadata.get("since") or rule.metadata["until"]
        assert version(KNOWN_RELEASES[0]) < version(release) <= version(KNOWN_RELEASES[-1])
        # It tells two of the releases apart that mini was compared with.
        assert len({getattr(rules_for(known), rule.name) for known in KNOWN_RELEASES}) == 2
        assert rule.metadata["sentence"].endswith(".")
    assert len(rules_for("0.32.0").describe()) == len(dataclasses.fields(Rules)) - 1


@pytest.mark.parametrize(
    "name, release",
    [("0.32", "0.32.0"), ("v0.33.0", "0.33.0"), ("0.20.2+cu130", "0.20.2"), ("0.11", "0.11.0")],
)
def test_short_and_local_names(name, release):
    assert rules_for(name).release == release


@pytest.mark.parametrize("name", ["0.10.2", "1.0", "0", "", "0.3"])
def test_unknown_release_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"known: 0\.8\.5, 0\.9\.2.*0\.33\.0"):
        rules_for(name)


def test_hash_seed():
    assert rules_for("0.32.0").none_hash_seed == "vllm-none-hash"
    assert rules_for("0.11.0").none_hash_seed is None
