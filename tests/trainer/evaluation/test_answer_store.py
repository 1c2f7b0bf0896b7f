"""Answers on disk: of all ranks together, whatever a kill left of the last line."""

import json
from pathlib import Path

from trainer.evaluation.answer_store import AnswerStore, question_id

FACTS = {"split": "test", "weights": {"base": "b", "adapter": "a"}, "system_message": None}


def test_answers_of_all_ranks_are_read_and_other_facts_have_another_folder(tmp_path: Path) -> None:
    store = AnswerStore.of(tmp_path, "adapter", FACTS)
    assert store.read() == {}
    assert not list(tmp_path.iterdir())
    store.append(0, [("q1", "7\n"), ("q2", "zwölf")])
    store.append(1, [("q3", ""), ("q1", "another")])
    assert store.read() == {"q1": "7\n", "q2": "zwölf", "q3": ""}
    assert store.folder.name.startswith("test-adapter-")
    assert json.loads((store.folder / "facts.json").read_text()) == FACTS
    other = AnswerStore.of(tmp_path, "adapter", FACTS | {"system_message": "Be brief."})
    assert other.folder != store.folder
    assert other.read() == {}


def test_a_line_that_a_kill_cut_short_is_asked_again_and_spoils_no_other(tmp_path: Path) -> None:
    store = AnswerStore.of(tmp_path, "base", FACTS)
    store.append(0, [("q1", "7"), ("q2", "8")])
    file = store.folder / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    assert store.read() == {"q1": "7"}
    store.append(0, [("q2", "8"), ("q3", "9")])
    assert store.read() == {"q1": "7", "q2": "8", "q3": "9"}
    file.write_text(
        '["no answer"]\n{"question": 1, "prediction": "x"}\n{"question": "q", "prediction": null}\n'
    )
    assert store.read() == {}
    (store.folder / "rank-1.jsonl").mkdir()
    assert store.read() == {}


def test_a_question_is_its_text_and_its_image() -> None:
    ids = {question_id(*pair) for pair in (("a", "i"), ("b", "i"), ("a", "j"), ("i", "a"))}
    assert len(ids) == 4
