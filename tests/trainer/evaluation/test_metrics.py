"""The metric agrees with the public harnesses, oddities included, and its statistics with known values."""

import pytest

from launch.statistics import mcnemar
from trainer.data.relaxed_accuracy import correct
from trainer.evaluation.metrics import Prediction, paired, summary, wilson


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("105", "100"),
        ("95", "100"),
        ("-104", "-100"),
        ("0.52", "50%"),  # the percent sign divides by 100 on either side
        ("51%", "0.5"),
        ("51%", "50%"),
        ("2100", "2000"),  # years are numbers like any other
        ("Yes", "yes"),
        ("1,000", "1,000"),
        ("0", "0"),
        ("0%", "0%"),
        (" 42\n", "42"),
        (" Blue ", "blue"),
        ("1e3", "1000"),
        ("100%%", "1"),  # every trailing sign is taken off, one division
        ("", ""),
        ("Yes", "Yes "),  # white space and the form of accents are nobody's answer
        ("Yes", "yes\n"),
        ("50%", " 50% "),
        ("Caf\u00e9", "Cafe\u0301"),
        ("Cafe\u0301", "Caf\u00e9"),
    ],
)
def test_answers_the_harnesses_count_as_right(prediction: str, target: str) -> None:
    assert correct(prediction, target)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("105.1", "100"),
        ("94.9", "100"),
        ("100", "-100"),
        ("50%", "50"),
        ("50", "50%"),
        ("0.0", "0"),  # a target of zero is compared as text
        ("0.01", "0"),
        ("0", "0%"),
        ("1000", "1,000"),  # a thousands separator makes text
        ("1,020", "1,000"),
        ("42 million", "42"),
        ("$42", "42"),
        ("light blue", "blue"),
        ("nan", "1"),
        ("nan", "nan"),
        ("inf", "1"),
        ("", "1"),
        ("%", "1"),
        ("[1, 2]", "1"),
    ],
)
def test_answers_the_harnesses_count_as_wrong(prediction: str, target: str) -> None:
    assert not correct(prediction, target)


def _rows(group: int, right: int, wrong: int) -> list[Prediction]:
    answers = ["7"] * right + ["9"] * wrong
    return [Prediction(prediction=answer, target="7", human_or_machine=group) for answer in answers]


def test_summary_reports_human_augmented_and_overall_with_counts_and_standard_error() -> None:
    report = summary(_rows(0, right=9, wrong=16) + _rows(1, right=75, wrong=0))
    assert report["human"] == {
        "percent": 36.0,
        "standard_error": pytest.approx(9.6),
        "interval": [pytest.approx(20.25, abs=0.01), pytest.approx(55.48, abs=0.01)],
        "correct": 9,
        "count": 25,
    }
    augmented = report["augmented"]
    assert (augmented["percent"], augmented["standard_error"]) == (100.0, 0.0)
    assert (augmented["correct"], augmented["count"]) == (75, 75)
    assert report["overall"]["percent"] == 84.0
    assert report["overall"]["count"] == 100


def test_the_standard_error_of_the_whole_test_split_is_three_quarters_of_a_point() -> None:
    report = summary(_rows(0, right=1037, wrong=213) + _rows(1, right=1038, wrong=212))
    assert report["overall"]["percent"] == 83.0
    assert report["overall"]["standard_error"] == pytest.approx(0.75, abs=0.005)


def test_a_group_without_questions_has_no_percentage() -> None:
    report = summary(_rows(1, right=1, wrong=1))
    nothing = {"percent": None, "standard_error": None, "interval": None}
    assert report["human"] == nothing | {"correct": 0, "count": 0}


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (1, 10, 1.79, 40.42), (81, 263, 25.53, 36.62)],
)
def test_the_interval_is_the_one_of_newcombes_tables(right: int, count: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (81 of 263); of none and all the closed form."""
    assert wilson(right, count) == [pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01)]


def test_a_pair_says_what_was_gained_and_what_was_lost() -> None:
    before, after = [False] * 10 + [True] * 5, [True] * 10 + [False] * 2 + [True] * 3
    assert paired(before, after) == {"gained": 10, "lost": 2, "p": mcnemar(before, after)}


def test_mcnemar_counts_changed_outcomes_only() -> None:
    # 10 became right, 2 became wrong: 2 * (1 + 12 + 66) / 2**12
    before = [False] * 10 + [True] * 2
    after = [True] * 10 + [False] * 2
    assert mcnemar(before, after) == pytest.approx(158 / 4096)
    assert mcnemar(before + [True] * 500, after + [True] * 500) == mcnemar(before, after)
    assert mcnemar(after, before) == mcnemar(before, after)


def test_mcnemar_finds_nothing_where_nothing_or_as_much_changed() -> None:
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([True, False], [False, True]) == 1.0
    assert mcnemar([], []) == 1.0


def test_mcnemar_is_exact_for_a_whole_test_split() -> None:
    assert mcnemar([False] * 1000, [True] * 1000) == 2.0**-999
    assert 0 < mcnemar([False] * 1300 + [True] * 1200, [True] * 1300 + [False] * 1200) < 0.05


def test_mcnemar_refuses_outcomes_of_different_questions() -> None:
    with pytest.raises(ValueError, match="shorter"):
        mcnemar([True, False], [True])
