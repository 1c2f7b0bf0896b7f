"""Each forbidden combination: refused by its own rule, with the numbers, and no other request is."""

from dataclasses import replace

import pytest

from launch import rules
from launch.errors import ConfigError
from launch.rules import Request, violations
from tests.indexes import embedded_recipe

ALLOWED = Request(
    embedded_recipe(),
    strategy="ddp",
    nodes=2,
    gpus_per_node=4,
    samples=330,
    max_steps=30,
    budget=400,
    longest=100,
)


def test_an_allowed_request_breaks_no_rule() -> None:
    assert list(violations(ALLOWED)) == []


@pytest.mark.parametrize(
    ("rule", "request_", "numbers"),
    [
        (rules.strategy_is_available, replace(ALLOWED, strategy="fsdp"), "single, ddp"),
        (rules.topology_is_positive, replace(ALLOWED, nodes=0), "0 nodes, 4 processes"),
        (rules.single_is_one_process, replace(ALLOWED, strategy="single"), "8 asked for"),
        (rules.every_process_gets_a_sample, replace(ALLOWED, nodes=9), "32 < 36"),
        (rules.data_fills_one_step, replace(ALLOWED, samples=31, max_steps=0), "31 < 32"),
        (rules.run_has_a_step, replace(ALLOWED, max_steps=0), "330 samples"),
        (rules.micro_batch_holds_the_longest_sample, replace(ALLOWED, budget=99), "100 tokens > 99"),
        (
            rules.warm_up_ends_within_the_run,
            replace(ALLOWED, recipe=embedded_recipe("training.warmup_steps=30")),
            "30 of 30 steps",
        ),
        (
            rules.upload_is_available,
            replace(ALLOWED, recipe=embedded_recipe("hub.push=true", "hub.repo_id=a/b")),
            "not available yet",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_forbidden_request_breaks_its_rule_alone(rule: rules.Rule, request_: Request, numbers: str) -> None:
    (message,) = violations(request_)
    assert message == rule(request_)
    assert numbers in message
    assert ";" in message


def test_every_rule_has_a_case_above() -> None:
    assert len(rules.REQUEST_RULES + rules.DATA_RULES) == 9


@pytest.mark.parametrize(
    "edge",
    [
        replace(ALLOWED, nodes=8),  # a process for each sample
        replace(ALLOWED, samples=32, max_steps=1),
        replace(ALLOWED, budget=100),
        replace(ALLOWED, strategy="single", nodes=1, gpus_per_node=1),
        replace(ALLOWED, strategy="ddp", nodes=1, gpus_per_node=1),
        replace(ALLOWED, recipe=embedded_recipe("training.warmup_steps=29")),
    ],
)
def test_the_last_allowed_request_before_each_limit_is_allowed(edge: Request) -> None:
    assert list(violations(edge)) == []


def test_a_topology_is_refused_before_the_data_is_known() -> None:
    with pytest.raises(ConfigError) as caught:
        rules.refuse_topology(embedded_recipe(), "zero3", 1, 64)
    assert len(caught.value.problems) == 2
    rules.refuse_topology(embedded_recipe(), "ddp", 1, 2)
