"""Submission files, byte by byte."""

import json

import pytest

from chatglm_ptuning.data.tasks import load_task
from chatglm_ptuning.data.tasks.arguments import submission_variant
from chatglm_ptuning.data.tasks.examples import ChoiceExample, QuestionExample, TextExample, TokenExample
from chatglm_ptuning.data.tasks.heads.head import Prediction
from chatglm_ptuning.data.tasks.submission import write_submission as write_predictions


def write_submission(task, examples, values, *more, **settings):
    return write_predictions(task, examples, list(map(Prediction, values)), *more, **settings)


TEXTS = [TextExample(id=7, text="甲"), TextExample(id=8, text="乙")]
CHOICES = [
    ChoiceExample(id="#idiom577157#", candidates=("甲", "乙")),
    ChoiceExample(id="#idiom577158#", candidates=("丙",)),
]
QUESTIONS = [QuestionExample(id="TEST_0_QUERY_0", context="他来", question="谁？")]
TOKENS = [TokenExample(id=0, tokens=tuple("四川敦煌的张三和四川"))]
TAGS = ["B-address", "I-address", "B-address", "I-address", "O", "B-name", "I-name", "O", "B-address", "I-address"]


@pytest.mark.parametrize(
    ("task", "split", "name", "labels", "shown"),
    [
        ("tnews", "test", "tnews11_predict.json", ["102", "110"], ["102", "110"]),
        ("tnews", "test1.0", "tnews10_predict.json", ["102", "110"], ["102", "110"]),
        ("iflytek", "test", "iflytek_predict.json", ["0", "118"], ["0", "118"]),
        ("afqmc", "test", "afqmc_predict.json", ["0", "1"], ["0", "1"]),
        ("cmnli", "test", "cmnli_predict.json", ["neutral", "entailment"], ["neutral", "entailment"]),
        ("ocnli", "test", "ocnli_50k_predict.json", ["neutral", "entailment"], ["neutral", "entailment"]),
        ("csl", "test", "csl_predict.json", ["0", "1"], ["0", "1"]),
        ("cluewsc2020", "test", "cluewsc11_predict.json", ["true", "false"], ["true", "false"]),
        ("eprstmt", "test", "eprstmt_predict.json", ["Positive", "Negative"], ["Positive", "Negative"]),
        ("bustm", "test", "bustm_predict.json", ["0", "1"], ["0", "1"]),
        ("csldcp", "test", "csldcp_predict.json", ["力学", "数学"], ["力学", "数学"]),
        ("fewclue_ocnli", "test", "ocnlif_predict.json", ["neutral", "neutral"], ["neutral", "neutral"]),
        ("fewclue_tnews", "test", "tnewsf_predict.json", ["100", "101"], ["100", "101"]),
        ("fewclue_iflytek", "test", "iflytekf_predict.json", ["99", "1"], ["99", "1"]),
        ("fewclue_cluewsc", "test", "cluewscf_predict.json", ["false", "true"], ["false", "true"]),
        ("fewclue_csl", "test", "cslf_predict.json", ["0", "1"], ["0", "1"]),
    ],
)
def test_label_lines(tmp_path, task, split, name, labels, shown):
    path = write_submission(load_task(task), TEXTS, labels, tmp_path / "new", split)
    assert path == tmp_path / "new" / name
    assert path.read_text("utf-8") == "".join(
        f'{{"id": {number}, "label": "{label}"}}\n' for number, label in zip((7, 8), shown, strict=True)
    )


@pytest.mark.parametrize(("train_split", "name"), [("train_few_all", "all"), ("train_0", "0"), ("train_4", "4")])
def test_fewclue_has_a_file_for_each_training_split(tmp_path, train_split, name):
    variant = submission_variant(load_task("bustm"), train_split)
    path = write_submission(load_task("bustm"), TEXTS, ["0", "1"], tmp_path, variant=variant)
    assert path.name == f"bustm_predict_{name}.json"
    assert submission_variant(load_task("tnews"), "train") is None


def test_choices(tmp_path):
    path = write_submission(load_task("chid"), CHOICES, [1, 0], tmp_path)
    assert path.name == "chid11_predict.json"
    assert json.loads(path.read_text("utf-8")) == {"#idiom577157#": 1, "#idiom577158#": 0}
    few = [ChoiceExample(id=3000, candidates=("甲", "乙"))]
    path = write_submission(load_task("fewclue_chid"), few, [1], tmp_path)
    assert (path.name, path.read_text("utf-8")) == ("chidf_predict.json", '{"id": 3000, "answer": 1}\n')
    path = write_submission(load_task("c3"), few, [0], tmp_path, "test1.0")
    assert (path.name, path.read_text("utf-8")) == ("c310_predict.json", '{"id": 3000, "label": 0}\n')
    exam = [ChoiceExample(id=0, candidates=tuple("甲乙丙丁"), subject="law"),
            ChoiceExample(id=0, candidates=tuple("甲乙丙丁"), subject="logic")]  # fmt: skip
    path = write_submission(load_task("ceval"), exam, [2, 0], tmp_path)
    assert json.loads(path.read_text("utf-8")) == {"law": {"0": "C"}, "logic": {"0": "A"}}


@pytest.mark.parametrize("task", ["cmrc2018", "drcd"])
def test_answers(tmp_path, task):
    path = write_submission(load_task(task), QUESTIONS, ["他"], tmp_path)
    assert path.name == f"{task}_predict.json"
    assert path.read_text("utf-8") == '{\n  "TEST_0_QUERY_0": "他"\n}\n'


def test_entities(tmp_path):
    path = write_submission(load_task("cluener"), TOKENS, [TAGS], tmp_path)
    assert path.name == "cluener_predict.json"
    assert path.read_text("utf-8") == (
        '{"id": 0, "label": {"address": {"四川": [[0, 1], [8, 9]], "敦煌": [[2, 3]]}, "name": {"张三": [[5, 6]]}}}\n'
    )


@pytest.mark.parametrize(
    ("task", "examples", "predictions", "message"),
    [
        ("msra_ner", TOKENS, [["O"] * 10], "msra_ner .*no submission file"),
        ("tnews", TEXTS, ["102"], "1 predictions .*2 examples"),
        ("tnews", TEXTS, ["102", "娱乐"], "'娱乐'.* no label .*tnews"),
        ("chid", CHOICES, [1, 1], "index .* 1 candidates.* 1"),
        ("chid", CHOICES, ["甲", 0], "index .* 2 candidates.*'甲'"),
        ("chid", [CHOICES[0]] * 2, [0, 0], "duplicate id '#idiom577157#'"),
        ("tnews", [TEXTS[0]] * 2, ["102", "102"], "duplicate id 7"),
        ("cluener", TOKENS * 2, [TAGS] * 2, "duplicate id 0"),
        ("cluener", TOKENS, [["O"]], "1 tags .*10 tokens"),
        ("cluener", TOKENS, [["B-nom"] * 10], "unknown tag 'B-nom'"),
        ("cmrc2018", QUESTIONS, [None], "must be text"),
    ],
)
def test_invalid_predictions_are_refused_and_nothing_is_written(tmp_path, task, examples, predictions, message):
    with pytest.raises(ValueError, match=message):
        write_submission(load_task(task), examples, predictions, tmp_path)
    assert not list(tmp_path.iterdir())
