"""Requests held against the rules: every violation at once."""

from __future__ import annotations

from collections.abc import Iterator

from launch.errors import ConfigError
from launch.recipe.schema import Recipe
from launch.rules.accelerate_config import LaunchConfig
from launch.rules.config_rules import CONFIG_RULES
from launch.rules.machine_rules import MACHINE_RULES
from launch.rules.request import PlanRequest, Rule
from launch.rules.request_rules import DATA_RULES, REQUEST_RULES, SCHEMA_RULES
from launch.strategies import STRATEGIES


def violations(request: PlanRequest) -> Iterator[str]:
    """Yield the message of every rule the request breaks."""
    return _broken((*_early(request), *DATA_RULES), request)


def refuse_request(request: PlanRequest) -> None:
    """ConfigError with every rule that the request breaks."""
    if problems := list(violations(request)):
        raise ConfigError(problems)


def refuse_topology(
    recipe: Recipe,
    strategy: str,
    nodes: int,
    gpus_per_node: int,
    capability: tuple[int, int] | None = None,
    device: str = "",
    packages_here: bool = True,
) -> None:
    """ConfigError with all that can be said before the data is prepared, which may take long.

    `capability`: of the GPUs that will be used, where they are those of this machine. `device`, `packages_here`: as
    of `PlanRequest`.
    """
    request = PlanRequest(
        recipe,
        strategy,
        nodes,
        gpus_per_node,
        samples=0,
        max_steps=0,
        budget=0,
        longest=0,
        capability=capability,
        device=device,
        packages_here=packages_here,
    )
    if problems := list(_broken(_early(request), request)):
        raise ConfigError(problems)


def refuse_config(recipe: Recipe, strategy: str, nodes: int, config: LaunchConfig) -> None:
    """ConfigError with every rule that the configuration of a launch breaks."""
    request = PlanRequest(
        recipe, strategy, nodes, 1, samples=0, max_steps=0, budget=0, longest=0, config=config
    )
    if problems := list(_broken(CONFIG_RULES, request)):
        raise ConfigError(problems)


def refuse_unfit_machine(recipe: Recipe, strategy: str, capability: tuple[int, int] | None) -> None:
    """ConfigError with what speaks against this machine's packages and GPUs, for a plan that another one made."""
    request = PlanRequest(
        recipe, strategy, 1, 1, samples=0, max_steps=0, budget=0, longest=0, capability=capability
    )
    if problems := list(_broken(MACHINE_RULES, request)):
        raise ConfigError(problems)


def rule_rows() -> list[tuple[str, str]]:
    """(rule, reason) of everything that is refused, for `samestep rules`."""
    rules = (*REQUEST_RULES, *CONFIG_RULES, *MACHINE_RULES, *DATA_RULES)
    named = [(rule.__name__.replace("_", " "), " ".join((rule.__doc__ or "").split())) for rule in rules]
    return [*named, *((f"{key} (by the recipe)", reason) for key, reason in SCHEMA_RULES)]


def _early(request: PlanRequest) -> tuple[Rule, ...]:
    """Rules before the data is known; those of a configuration only where there is one."""
    known = request.strategy in STRATEGIES
    return (*REQUEST_RULES, *(CONFIG_RULES if known else ()), *MACHINE_RULES)


def _broken(rules: tuple[Rule, ...], request: PlanRequest) -> Iterator[str]:
    return (message for rule in rules if (message := rule(request)))
