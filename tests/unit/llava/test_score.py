"""Scores of answers that were worked out by hand."""

import json

import pytest

from qlip.errors import InputError
from qlip.llava.score import exact_match, normalize_answer, pope, says_yes, score, vqa_accuracy


def written(path, *entries, lines=True):
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(list(entries)))
    return path


def test_pope_by_hand(tmp_path):
    said = {
        1: "Yes",
        2: "No, there is no dog in the picture.",
        3: "yes",
        4: "No",
        5: "There is not.",
        6: "Yes. No.",
    }
    labels = {1: "yes", 2: "no", 3: "no", 4: "yes", 5: "no", 6: "yes"}
    answers = written(tmp_path / "answers.jsonl", *({"question_id": k, "text": v} for k, v in said.items()))
    truth = written(tmp_path / "coco_pope.json", *({"question_id": k, "label": v} for k, v in labels.items()))
    # yes said to 1, 3, 6; right of those 1 and 6; of three that are there one is denied
    found = score("pope", answers, truth)
    assert found == pytest.approx(
        {"num_questions": 6, "accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_share": 0.5}
    )


def test_pope_without_a_yes():
    found = pope([("no", "no"), ("no", "yes")])
    assert (found["accuracy"], found["precision"], found["recall"], found["f1"]) == (0.5, 0, 0, 0)


def test_what_is_a_no():
    assert says_yes("A nose, known to all") and says_yes("")
    assert not says_yes("No, it is a cat") and not says_yes("It is not one")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The dog.", "dog"),
        ("Two  cats\n", "2 cats"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("red/white", "red white"),
        ("red / white", "red white"),
        ("yes, it is", "yes it is"),
        ("yes,no", "yes no"),
        ("1,000", "1000"),
        ("3.5 m.", "3.5 m"),
        ("t-shirt", "t shirt"),
        ("wait - no", "wait no"),
        ("What?", "what"),
    ],
)
def test_normalised_as_vqa_does(text, plain):
    assert normalize_answer(text) == plain


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_over_who_is_left_out(same, accuracy):
    people = ["a red ball"] * same + ["blue"] * (10 - same)
    assert vqa_accuracy("Red ball.", people) == pytest.approx(accuracy)


@pytest.mark.parametrize("key", ["annotations", "data"])
def test_files_of_vqa(tmp_path, key):
    people = [["yes"] * 10, ["2"] * 2 + ["3"] * 8]
    annotations = [
        {"question_id": i, "answers": [{"answer": a} for a in answers] if key == "annotations" else answers}
        for i, answers in enumerate(people)
    ]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({key: annotations}))
    answers = written(
        tmp_path / "a.json", *({"question_id": i, "answer": a} for i, a in enumerate(["Yes", "two"])), lines=False
    )
    assert score("vqa", answers, labels) == pytest.approx({"num_questions": 2, "accuracy": 0.8})


def test_files_of_gqa(tmp_path):
    labels = tmp_path / "testdev_balanced_questions.json"
    labels.write_text(json.dumps({"201": {"answer": "no"}, "202": {"answer": "coffee table"}}))
    answers = written(
        tmp_path / "a.jsonl", {"question_id": "201", "text": "No."}, {"question_id": "202", "text": "a table"}
    )
    assert score("gqa", answers, labels) == {"num_questions": 2, "accuracy": 0.5}
    assert exact_match(" Coffee table.", "coffee table") == 1


def test_what_is_wrong_is_said(tmp_path):
    labels = written(
        tmp_path / "labels.jsonl", {"question_id": 7, "label": "yes"}, {"question_id": 8, "label": "no"}
    )
    answers = written(tmp_path / "answers.jsonl", {"question_id": 7, "text": "yes"})
    with pytest.raises(InputError, match="no answer to 1 of 2 questions, as '8'"):
        score("pope", answers, labels)
    with pytest.raises(InputError, match="not the labels of vqa"):
        score("vqa", answers, labels)
    with pytest.raises(InputError, match="each needs question_id"):
        score("pope", labels, labels)
    with pytest.raises(InputError, match="cannot be read"):
        score("pope", tmp_path / "none", labels)


def test_null_is_no_answer_and_a_second_answer_is_refused(tmp_path):
    answers, labels = tmp_path / "a.jsonl", tmp_path / "l.json"
    labels.write_text(json.dumps({"1": {"answer": "none"}, "2": {"answer": 3}}))
    answers.write_text('{"question_id": 1, "text": null}\n{"question_id": 2, "text": "3."}\n')
    assert score("gqa", answers, labels) == {"num_questions": 2, "accuracy": 0.5}
    answers.write_text('{"question_id": 1, "text": "a"}\n{"question_id": "1", "text": "b"}\n')
    with pytest.raises(InputError, match="two entries for question '1'"):
        score("gqa", answers, labels)
    answers.write_text('{"question_id": 1, "text": "a"}\n{broken\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        score("gqa", answers, labels)
