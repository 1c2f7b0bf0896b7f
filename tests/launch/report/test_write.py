"""The report: what it holds, that foreign text stays text, and what it refuses."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.report import gallery
from launch.report.write import write_report
from launch.run.blamed import blame_file
from launch.run.directory import RunDirectory
from launch.subprocesses import ChildError
from tests.helpers.launcher import samestep
from tests.helpers.reported_run import HOSTILE, evaluation_of, reported_run, stand_in_for_images

VOID = {"meta", "br", "img"}


class Parsed(HTMLParser):
    """Elements in their order, texts outside of scripts and styles, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    """The report of one run whose every foreign text would like to be a script."""
    run = reported_run(tmp_path_factory.mktemp("runs") / "first")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_images(monkeypatch)
        return Parsed(write_report([run]).read_text())


def test_text_of_others_stays_text(page: Parsed) -> None:
    assert page.open == []
    assert page.count("script") == 3
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(
        str(attributes["src"]).startswith("data:") for tag, attributes in page.elements if tag == "img"
    )
    assert HOSTILE in page.words
    assert "49" not in [text.strip() for text in page.texts]


def test_nothing_is_loaded_from_elsewhere(page: Parsed) -> None:
    assert page.count("link") == page.count("iframe") == 0
    for _, attributes in page.elements:
        assert not attributes.get("href") or str(attributes["href"]).startswith("#")
    (policy,) = [
        str(attributes["content"])
        for tag, attributes in page.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert policy.count("'sha256-") == 2


def test_it_says_what_was_trained_how_it_went_and_what_it_proves(page: Parsed) -> None:
    for words in (
        "37 steps of 8 samples",  # six epochs of 50 samples
        "LoRA of rank 16",
        "12 of 20",  # right answers of the adapter
        "+9",  # gained
        "−1",  # lost
        "preempted: at step 20",
        "n[1-2]",
        "58 in all: 14 changed",
        "NVIDIA H100",
        "2.0 GiB",
    ):
        assert words in page.words, words
    assert "secret-host" not in page.words


def test_every_question_stands_beside_its_chart_with_the_answers_of_all_variants(page: Parsed) -> None:
    cards = [attributes for tag, attributes in page.elements if tag == "article"]
    assert len(cards) == page.count("img") == 20
    assert [card["data-right"] for card in cards[:2]] == ["11", "01"]
    assert {card["data-kind"] for card in cards} == {"human", "augmented"}


def test_the_gallery_is_bounded_and_shows_every_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in_for_images(monkeypatch)
    file = write_report([reported_run(tmp_path / "many", 500, 300)])
    shown = [
        dict(attributes)["data-right"]
        for tag, attributes in Parsed(file.read_text()).elements
        if tag == "article"
    ]
    assert len(shown) == gallery.MOST_QUESTIONS == len(calls[0][calls[0].index("--rows") + 1].split(","))
    assert all(shown.count(outcome) == gallery.MOST_QUESTIONS // 4 for outcome in ("00", "01", "10", "11"))
    assert file.stat().st_size < 7_000_000


def test_several_runs_are_paired_on_the_same_questions_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_for_images(monkeypatch)
    first = reported_run(tmp_path / "first")
    second = reported_run(tmp_path / "second", 20, 15, "lora.r=4")
    lines = [json.loads(line) for line in second.metrics_file.read_text().splitlines()]
    for line in lines[24:]:
        line["samples_digest"] = "other"
    second.metrics_file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    file = write_report([first, second])
    assert file == tmp_path / "report.html"
    words = Parsed(file.read_text()).words
    assert "first adapter second adapter +3 −0 20 0.25" in words
    assert "lora.r 16 4" in words
    assert "first, second 30 24 25 0" in words


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stand_in_for_images(monkeypatch)
    run = reported_run(tmp_path / "early")
    for file in (run.metrics_file, run.evaluations_file, run.environment_file, run.eval_file()):
        file.unlink()
    page = Parsed(write_report([run]).read_text())
    assert calls == []
    assert page.count("article") == 0
    assert "not recorded" in page.words


def test_damaged_files_are_named_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_images(monkeypatch)
    run = reported_run(tmp_path / "damaged")
    run.metrics_file.write_text(run.metrics_file.read_text() + '{"step": 31, "lo')
    run.environment_file.write_text("{")
    (run.path / "eval-validation.json").write_text("[]")
    (run.path / "eval-64.json").write_text(
        '{"accuracy": {"base": {}}, "split": "test", "predictions": [{"row": 1}]}'
    )
    words = Parsed(write_report([run]).read_text()).words
    for named in ("metrics.jsonl: 1 lines", "environment.json", "eval-validation.json", "eval-64.json"):
        assert named in words
    assert "12 of 20" in words


@pytest.mark.parametrize(
    ("kept", "warnings", "changed"),
    [
        ({"agrees": True}, 0, 0),
        ({"agrees": False}, 1, 0),
        ({}, 1, 0),
        ({"agrees": True, "changed": ["lora.dropout was 0.1 and is 0.05"]}, 0, 1),
    ],
)
def test_a_step_whose_loss_did_not_come_out_again_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: dict[str, object], warnings: int, changed: int
) -> None:
    stand_in_for_images(monkeypatch)
    run = reported_run(tmp_path / "blamed")
    sample = {
        "row": 3,
        "loss": 2.0,
        "share": 2.0,
        "target_tokens": 2,
        "tokens": 80,
        "question": "q",
        "target": "t",
    }
    file = blame_file(run, 6)
    file.parent.mkdir()
    file.write_text(json.dumps({"step": 6, "checkpoint": "step 0", "loss": 2.0, "samples": [sample], **kept}))
    words = Parsed(write_report([run]).read_text()).words
    assert "Step 6, loss 2" in words
    assert words.count("This loss is not the one that the run recorded") == warnings
    assert words.count("before a change that was allowed") == words.count("lora.dropout was 0.1") == changed


def test_charts_that_cannot_be_read_leave_a_report_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(module: str, arguments: object) -> None:
        raise ChildError(module, 2)

    monkeypatch.setattr(gallery, "call_module", fail)
    page = Parsed(write_report([reported_run(tmp_path / "moved")]).read_text())
    assert page.count("article") == 20
    assert page.count("img") == 0
    assert "could not be read" in page.words


def test_an_interrupted_report_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(module: str, arguments: object) -> None:
        raise KeyboardInterrupt

    run = reported_run(tmp_path / "again")
    (run.path / "report.html").write_text("older")
    monkeypatch.setattr(gallery, "call_module", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report([run])
    assert (run.path / "report.html").read_text() == "older"
    stand_in_for_images(monkeypatch)
    assert write_report([run]).read_text() != "older"


def test_the_command_prints_the_path_and_refuses_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_for_images(monkeypatch)
    monkeypatch.chdir(tmp_path)
    run = reported_run(tmp_path / "runs" / "mine")
    assert samestep("report", "mine") == 0
    assert str(run.path / "report.html") in capsys.readouterr().out
    for arguments, reason in (
        (["other"], "no such run"),
        (["mine", "mine"], "named twice"),
        (["mine", "--output", str(tmp_path)], "is a folder"),
        (["mine", "--output", str(tmp_path / "no" / "x.html")], "is no folder"),
    ):
        assert samestep("report", *arguments) == 2
        assert reason in capsys.readouterr().err
    run.recipe_file.write_text("name: [")
    assert samestep("report", "mine") == 2
    assert "recipe.yaml" in capsys.readouterr().err


def test_a_question_that_changed_between_two_runs_is_not_paired(tmp_path: Path) -> None:
    from launch.report.evaluations import pair_runs, read_evaluation_files

    runs = [RunDirectory(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        run.path.mkdir()
        run.eval_file().write_text(json.dumps(evaluation_of(4, 2)))
    changed = evaluation_of(4, 2)
    changed["predictions"][0]["label"] = ["another"]
    runs[1].eval_file().write_text(json.dumps(changed))
    (first,), (second,) = (read_evaluation_files(run)[0] for run in runs)
    pair = pair_runs(first, second, "adapter")
    assert pair is not None
    assert (pair.questions, pair.gained, pair.lost) == (3, 0, 0)
