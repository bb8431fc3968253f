"""Scores of tasks, against scikit-learn, seqeval, scipy, and values by hand."""

import json
import random
import warnings

import numpy as np
import pytest
from matplotlib import image

from chatglm_ptuning import figures
from chatglm_ptuning.data.tasks import load_task, read_examples
from chatglm_ptuning.data.tasks.examples import (
    Answer,
    ChoiceExample,
    GenerationExample,
    QuestionExample,
    TextExample,
    TokenExample,
)
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.submission import write_submission
from chatglm_ptuning.evaluation.report import score_task, worst_errors, write_report
from chatglm_ptuning.metrics.classification import classification_scores, confusion_matrix
from chatglm_ptuning.metrics.entities import entities_of, spans_of
from chatglm_ptuning.metrics.intervals import f1_interval, mean_interval
from chatglm_ptuning.metrics.reading_comprehension import answer_f1, exact_match
from chatglm_ptuning.metrics.task_scores import score_answers, score_label_sets, score_tags

LABELS = ["体育", "军事", "农业", "电竞"]


@pytest.mark.parametrize("seed", range(5))
def test_classification_agrees_with_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(seed)
    expected = draw.choices(LABELS[: 2 + seed % 3], k=40)
    predicted = [draw.choice([label, *LABELS]) for label in expected]
    scores = classification_scores(predicted, expected, LABELS)
    assert scores["accuracy"] == pytest.approx(100 * metrics.accuracy_score(expected, predicted))
    assert scores["macro_f1"] == pytest.approx(100 * metrics.f1_score(expected, predicted, average="macro"))
    matrix = confusion_matrix(predicted, expected, LABELS)
    assert (matrix[:, :-1] == metrics.confusion_matrix(expected, predicted, labels=LABELS)).all()


def test_a_prediction_that_is_not_a_label_is_wrong():
    scores = classification_scores(["体育", "我不知道"], ["体育", "军事"], LABELS)
    assert scores == {"accuracy": 50.0, "macro_f1": 50.0}
    assert confusion_matrix(["我不知道"], ["军事"], LABELS)[1].tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="'旅游' is none of"):
        classification_scores(["体育"], ["旅游"], LABELS)


def random_tags(draw: random.Random) -> list[str]:
    return [draw.choice(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-ORG"]) for _ in range(12)]


@pytest.mark.parametrize("seed", range(5))
def test_entities_are_those_of_seqeval(seed):
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draw = random.Random(seed)
    expected, predicted = ([random_tags(draw) for _ in range(8)] for _ in range(2))
    for tags in (*expected, *predicted):
        assert spans_of(tags) == labeling.get_entities(tags)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = labeling.classification_report(expected, predicted, output_dict=True)
    scores = score_tags(predicted, expected)
    table = scores.entities
    assert scores.metrics["entity_f1"] == pytest.approx(100 * report["micro avg"]["f1-score"])
    assert {kind: (score.f1, score.support) for kind, score in table.items()} == {
        kind: (pytest.approx(100 * report[kind]["f1-score"]), report[kind]["support"]) for kind in table
    }


def test_entities_by_hand():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"]]
    found = score_tags([["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC"]], gold)
    scores, table = found.metrics, found.entities
    assert scores["entity_precision"] == pytest.approx(100 / 3)
    assert (scores["entity_recall"], scores["entity_f1"]) == (50.0, pytest.approx(40))
    assert (table["PER"].f1, table["LOC"].recall, table["LOC"].support) == (0.0, 100.0, 1)
    nothing = score_tags([["O"]], [["O"]])
    assert (nothing.metrics, nothing.entities) == (dict.fromkeys(scores, 0.0), {})
    with pytest.raises(ValueError, match=r"Sentence 1 .* 1 predicted .* 2 expected"):
        score_tags([gold[0], ["O"]], gold)


def test_cluener_counts_texts_once_a_sentence():
    # The same place name twice is one entry of the file, so finding one of them finds it.
    gold, found = ["B-address", "O", "B-address"], ["B-address", "O", "O"]
    for text, types, f1 in (("京到京", ["address"], 100), ("京到沪", ["address", "name"], 100 * (2 / 3) / 2)):
        entities = [[entities_of(text, tags)] for tags in (found, gold)]
        scores = score_tags([found], [gold], (*entities, types))
        assert scores.metrics["cluener_f1"] == pytest.approx(f1)


def test_cluener_counts_entities_inside_each_other(tmp_path):
    rows = [
        {"text": "中国人民银行行长周小川", "label": {
            "government": {"中国人民银行": [[0, 5]]}, "address": {"中国": [[0, 1]]},
            "position": {"行长": [[6, 7]]}, "name": {"周小川": [[8, 10]]}}},
        {"text": "他在北京", "label": {"address": {"北京": [[2, 3]]}}},
    ]  # fmt: skip
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    task = load_task("cluener")
    examples = read_examples(task, tmp_path, "dev")
    metrics = score_task(task, examples, [Prediction(list(example.tags)) for example in examples]).metrics
    # Tags find all but 中国: three of the ten types are whole, address has one of two, six are not there.
    assert metrics["cluener_f1"] == pytest.approx(100 * (3 + 2 / 3) / 10)
    assert metrics["entity_f1"] == 100


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("买入并持有", ["买入并持有"], 1, True),
        ("“买入并持有”。", ["买入，并持有"], 1, True),  # punctuation does not count
        ("买入并持有", ["买入持有"], 4 / 9, False),  # the longest run is 2 of 5 and 4, it is no subsequence
        ("甲乙", ["甲丙乙"], 2 / 5, False),
        ("共78.1", ["78.1"], 2 / 3, False),  # a number is one segment
        ("NBA球员", ["nba 球员"], 1, False),  # segments are equal, texts with a space inside are not
        ("abc，def", ["abcdef"], 1, True),  # what was apart by punctuation grows together, as in the script
        ("A boy", ["a boy ran"], 4 / 5, False),
        ("工商协进会", ["不知道", "协进会", "工商会"], 6 / 8, False),  # the best reference counts
        ("", ["甲"], 0, False),
        ("。", ["甲"], 0, False),
    ],
)
def test_cmrc_by_hand(prediction, references, f1, exact):
    assert answer_f1(prediction, references) == pytest.approx(f1)
    assert exact_match(prediction, references) is exact


def test_cmrc_means():
    scores = score_answers(["甲乙", "丙"], [["甲乙"], ["丁", "戊"]])
    assert scores.metrics == {"cmrc_f1": 50.0, "cmrc_em": 50.0, "cmrc_average": 50.0}


def test_intervals_agree_with_scipy_and_repeat():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).random(200)
    ours = mean_interval(values, resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours == mean_interval(values, resamples=4000)
    assert mean_interval([1.0] * 5) == (1.0, 1.0)
    low, high = f1_interval([(1, 1, 1), (0, 1, 1)] * 50)
    assert low < 50 < high and f1_interval([(2, 2, 2)] * 3) == (100.0, 100.0)


def test_worst_errors_are_sorted_by_confidence():
    rows = [{"id": i, "score": s, "confidence": c} for i, (s, c) in enumerate([(1, 0.9), (0, 0.2), (0, 0.8), (0.5, 1)])]
    assert [row["id"] for row in worst_errors(rows)] == [2, 1, 3]
    assert len(worst_errors([{"score": 0}] * 30)) == 20


def test_report_of_a_classification(tmp_path):
    task = load_task("bustm")
    examples = [TextExample(id=i, text="甲", fields={"text_pair": "乙"}, label=label) for i, label in enumerate("1101")]
    scores = write_report(tmp_path, task, examples, list(map(Prediction, "1001", [0.9, 0.8, 0.7, 0.6])))
    assert scores.metrics["accuracy"] == 75 and scores.metrics["macro_f1"] == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)
    low, high = scores.intervals["macro_f1"]
    assert low < scores.metrics["macro_f1"] < high
    written = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert written["confusion_matrix"] == [[2, 1, 0], [0, 1, 0]]
    assert list(written["labels_in_picture"].values()) == ["是", "否"]
    (error,) = map(json.loads, (tmp_path / "worst_errors.jsonl").read_text("utf-8").splitlines())
    assert (error["id"], error["gold"], error["prediction"], error["confidence"]) == (1, "1", "0", 0.8)
    assert len((tmp_path / "predictions.jsonl").read_text("utf-8").splitlines()) == 4
    assert image.imread(tmp_path / "confusion_matrix.png").std() > 0.05


def test_report_of_entities(tmp_path):
    task = load_task("entities")
    examples = [TokenExample(id=0, tokens=("海", "上"), tags=("B-LOC", "O"))]
    scores = write_report(tmp_path, task, examples, [Prediction(["B-LOC", "B-PER"])])
    assert scores.metrics["entity_precision"] == 50 and scores.intervals["entity_f1"][1] == pytest.approx(200 / 3)
    (row,) = map(json.loads, (tmp_path / "predictions.jsonl").read_text("utf-8").splitlines())
    assert row["gold"] == [{"type": "LOC", "text": "海", "start": 0}] and row["score"] == pytest.approx(2 / 3)
    assert image.imread(tmp_path / "entities.png").std() > 0.05


def test_reports_of_the_other_kinds(tmp_path):
    question = QuestionExample(id="Q", context="他来", question="谁？", answers=(Answer("他", 0), Answer("他来", 0)))
    assert score_task(load_task("cmrc2018"), [question], [Prediction("他来")]).metrics["cmrc_em"] == 100
    subjects = [("law", "Humanities"), ("law", "Humanities"), ("logic", "Humanities"), ("marxism", "Social Science")]
    exam = [
        ChoiceExample(id=place, candidates=tuple("甲乙丙丁"), answer=0, subject=subject, category=category)
        for place, (subject, category) in enumerate(subjects)
    ]
    scores = write_report(tmp_path, load_task("ceval"), exam, list(map(Prediction, [0, 1, 0, 1])))
    assert scores.groups == {"law": 50, "logic": 100, "marxism": 0, "Humanities": 75, "Social Science": 0,
                             "mean of subjects": 50}  # fmt: skip
    assert scores.metrics["accuracy"] == 50
    texts = [
        GenerationExample(id=0, text="类型#裤", target="宽松的裤子"),
        GenerationExample(id=1, text="裙", target="长裙"),
    ]
    scores = write_report(tmp_path, load_task("adgen"), texts, list(map(Prediction, ["宽松的裤子", ""])))
    assert scores.metrics["rouge-l"] == pytest.approx(50, abs=0.01) and scores.metrics["prediction_length"] == 2.5


def test_a_row_with_a_dropped_label_is_submitted_and_not_scored(tmp_path):
    row = {"sentence1": "他来了", "sentence2": "他没来"}
    labels = ["-", "neutral", "contradiction"]
    rows = [row | {"id": 4 + place, "label": label} for place, label in enumerate(labels)]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    task = load_task("cmnli")
    examples = read_examples(task, tmp_path, "test")
    predictions = [Prediction("neutral", confidence) for confidence in (0.9, 0.8, 0.7)]
    scores = write_report(tmp_path / "out", task, examples, predictions)
    write_submission(task, examples, predictions, tmp_path / "out", "test")
    assert scores.metrics["accuracy"] == 50
    written = {
        name: [json.loads(line) for line in (tmp_path / "out" / name).read_text("utf-8").splitlines()]
        for name in ("predictions.jsonl", "cmnli_predict.json")
    }
    assert [(row["id"], row["score"], row["confidence"]) for row in written["predictions.jsonl"]] == [
        (5, 1, 0.8), (6, 0, 0.7),
    ]  # fmt: skip
    assert [row["id"] for row in written["cmnli_predict.json"]] == [4, 5, 6]


def test_equal_candidates_count_as_right_unless_letters_differ(tmp_path):
    def rows_of(name: str, candidates: str, predictions: list[int]) -> tuple[list[dict], float]:
        subject = "law" if name == "ceval" else None
        examples = [
            ChoiceExample(id=place, candidates=tuple(candidates), answer=2, subject=subject)
            for place in range(len(predictions))
        ]
        scores = write_report(tmp_path / name, load_task(name), examples, list(map(Prediction, predictions)))
        lines = (tmp_path / name / "predictions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines], scores.metrics["accuracy"]

    rows, accuracy = rows_of("ceval", "甲乙乙丁", [1, 2, 3, 2])
    assert [(row["subject"], row["gold"], row["prediction"], row["score"]) for row in rows] == [
        ("law", "C", "B", 0), ("law", "C", "C", 1), ("law", "C", "D", 0), ("law", "C", "C", 1),
    ]  # fmt: skip
    assert accuracy == 50
    for name in ("c3", "chid"):  # the answer is the text itself, which stands twice
        rows, accuracy = rows_of(name, "甲乙乙丁", [1, 2, 3, 0])
        assert [(row["gold"], row["prediction"], row["score"]) for row in rows] == [
            ("乙", "乙", 1), ("乙", "乙", 1), ("乙", "丁", 0), ("乙", "甲", 0),
        ]  # fmt: skip
        assert accuracy == 50 and "subject" not in rows[0]


def test_predictions_that_cannot_be_scored_are_refused():
    with pytest.raises(ValueError, match=r"b.json:2: .*nothing to score"):
        score_task(load_task("bustm"), [TextExample(id=0, text="甲", where="b.json:2")], [Prediction("1")])
    with pytest.raises(ValueError, match=r"0 predictions .*0 examples"):
        score_task(load_task("bustm"), [], [])


def test_names_without_a_font_are_numbered(tmp_path, monkeypatch):
    assert figures.find_font(["accuracy"]) is not None
    assert figures.find_font(["\U0010fffd"]) is None  # a private character that no font has
    matrix = confusion_matrix(["体育", "?"], ["体育", "军事"], LABELS)
    shown = figures.draw_confusion_matrix(tmp_path / "a.png", matrix, ["\U0010fffd", *LABELS[1:]])
    assert shown == ["0", "1", "2", "3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that its font does not have
        named = figures.draw_confusion_matrix(tmp_path / "b.png", matrix, ["α", "β", "γ", "δ"], "τ")
        figures.draw_confusion_matrix(tmp_path / "c.png", np.eye(82, 83, dtype=int), [f"类{i}" for i in range(82)])
    assert named == ["α", "β", "γ", "δ"]
    assert (image.imread(tmp_path / "a.png") != image.imread(tmp_path / "b.png")).any()


def test_multi_label_scores_equal_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    binarizer = pytest.importorskip("sklearn.preprocessing").MultiLabelBinarizer(classes=["a", "b", "c", "never"])
    rng = random.Random(3)
    expected, predicted = ([rng.sample("abc", rng.randint(0, 3)) for _ in range(60)] for _ in range(2))
    found_scores = score_label_sets(predicted, expected, ["a", "b", "c", "never"])
    scores, table = found_scores.metrics, found_scores.labels
    gold, found = binarizer.fit_transform(expected), binarizer.transform(predicted)
    f1 = {name: 100 * metrics.f1_score(gold, found, average=name, zero_division=0) for name in ("micro", "macro")}
    assert scores["micro_f1"] == pytest.approx(f1["micro"])
    assert scores["macro_f1"] == pytest.approx(f1["macro"])
    assert scores["subset_accuracy"] == pytest.approx(100 * metrics.accuracy_score(gold, found))
    each = metrics.precision_recall_fscore_support(gold, found, average=None, zero_division=0)
    for place, label in enumerate(binarizer.classes_):
        ours = table[label]
        theirs = [column[place] for column in each]
        assert [ours.precision, ours.recall, ours.f1] == pytest.approx([100 * value for value in theirs[:3]])
        assert ours.support == theirs[3]
    with pytest.raises(ValueError, match=r"'d' .*a, b"):
        score_label_sets([["d"]], [["a"]], ["a", "b"])
