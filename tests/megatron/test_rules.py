"""The table of version differences."""

from __future__ import annotations

from dataclasses import fields

from pp_to_vpp.megatron.rules import CHANGES, Rules, candidates


def test_every_rule_has_one_row() -> None:
    assert sorted(field.name for field in fields(Rules)) == sorted(c.rule for c in CHANGES)


def test_signs_decide_the_first_guess() -> None:
    everything = {change.sign for change in CHANGES}
    assert next(candidates(everything)) == Rules(*[True] * len(CHANGES))
    assert next(candidates(())) == Rules(*[False] * len(CHANGES))
    for change in CHANGES:
        guess = next(candidates(everything - {change.sign}))
        assert not getattr(guess, change.rule)


def test_all_combinations_are_tried_once_the_likeliest_first() -> None:
    tried = list(candidates(()))
    assert len(tried) == len(set(tried)) == 2 ** len(CHANGES)
    doubts = [sum(getattr(rules, change.rule) for change in CHANGES) for rules in tried]
    assert doubts == sorted(doubts)


def test_rules_of_buffers_are_not_doubted_without_buffers() -> None:
    of_buffers = [change.rule for change in CHANGES if change.is_of_buffers]
    tried = list(candidates((), has_buffers=False))
    assert len(tried) == len(set(tried)) == 2 ** (len(CHANGES) - len(of_buffers))
    assert not any(getattr(rules, rule) for rules in tried for rule in of_buffers)


def test_rules_of_instances_are_not_doubted_with_one() -> None:
    of_instances = [change.rule for change in CHANGES if change.is_of_instances]
    tried = list(candidates((), has_instances=False))
    assert len(tried) == len(set(tried)) == 2 ** (len(CHANGES) - len(of_instances))
    assert not any(getattr(rules, rule) for rules in tried for rule in of_instances)
