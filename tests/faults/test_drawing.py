"""What the fault campaign chooses."""

from __future__ import annotations

from typing import get_args

from tests.faults.drawing import DAMAGES, LAYOUTS, Phase, draw_chain

CHAINS = range(200)


def test_the_choice_of_faults_is_the_seeds_alone() -> None:
    assert [draw_chain(7, number) for number in CHAINS] == [draw_chain(7, number) for number in CHAINS]
    assert draw_chain(7, 0) != draw_chain(8, 0)


def test_every_action_every_victim_and_every_damage_is_met_in_the_long_run() -> None:
    chains = [draw_chain(1, number) for number in CHAINS]
    assert all(3 <= len(chain.faults) <= 6 for chain in chains)
    assert {chain.layout for chain in chains} == {*LAYOUTS}
    faults = [fault for chain in chains for fault in chain.faults]
    victims = {fault.target for fault in faults if fault.action == "kill -9 of"}
    assert victims == {"rank", "launcher", "top", "all", "data worker"}
    assert {fault.phase for fault in faults} == {*get_args(Phase)}
    assert {fault.target for fault in faults if fault.action.startswith("damaged")} == {*DAMAGES}
    assert len({fault.action for fault in faults}) == 12
