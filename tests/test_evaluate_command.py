"""`chatglm-ptuning evaluate` on a tiny base that knows a few answers by heart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_base import ANSWERS, make_base, make_prefix

from chatglm_ptuning.data.formats.registry import Columns
from chatglm_ptuning.evaluation.arguments import EvaluationArguments
from chatglm_ptuning.evaluation.run import main
from chatglm_ptuning.metrics.generation import score

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"content": prompt, "summary": answer} for prompt, answer in ANSWERS.items()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prefix(base, tmp_path_factory):
    return make_prefix(base, tmp_path_factory.mktemp("runs") / "ads", "你好吗？我想去公园散步。")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATGLM_PTUNING_OUTPUT", "output")


@pytest.fixture
def test_file(tmp_path):
    return write(tmp_path / "test.json", ROWS)


def flags(base: Path, test_file: Path, *more: str) -> list[str]:
    named = ["--model_name_or_path", str(base), "--test_file", str(test_file)]
    columns = ["--prompt_column", "content", "--response_column", "summary"]
    return [*named, *columns, "--max_source_length", "64", "--max_target_length", "24", *more]


def read(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def test_the_plain_base(base, test_file, tmp_path, capsys):
    main(flags(base, test_file, "--output_dir", str(tmp_path / "scores")))
    results, predictions = read(tmp_path / "scores")
    assert [row["prediction"] for row in predictions] == [row["gold"] for row in predictions] == list(ANSWERS.values())
    assert results["metrics"]["exact_match"] == 100 and results["metrics"]["rouge-l"] == pytest.approx(100, abs=1e-3)
    assert results["counts"]["rows"] == results["counts"]["examples"] == len(ROWS)
    lengths = results["counts"]["lengths"]
    assert lengths["source"] == lengths["example"] and set(lengths["target"]) == {"50", "90", "99", "100"}
    assert results["settings"]["ptuning_checkpoint"] is None
    assert results["settings"]["max_target_length"] == 24 and results["settings"]["decoding"] == "greedy"
    assert "base_metrics" not in results and "base_prediction" not in predictions[0]
    assert "今天有雨" in (tmp_path / "scores" / "predictions.jsonl").read_text(encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["metrics.json", "predictions.jsonl"]
    printed = capsys.readouterr().out
    assert "plain base" in printed and "rouge-l" in printed and "100.00" in printed


def test_the_prompt_does_not_hold_the_answer(base, tmp_path):
    changed = [row | {"summary": "完全不同的回答" * 3} for row in ROWS]
    main(flags(base, write(tmp_path / "changed.json", changed), "--output_dir", "scores"))
    results, predictions = read(Path("scores"))
    assert [row["prediction"] for row in predictions] == list(ANSWERS.values())
    assert results["metrics"]["exact_match"] == 0
    for row, prompt in zip(predictions, ANSWERS, strict=True):
        assert prompt in row["input"] and "回答" not in row["input"]
        assert row["input"].startswith("[gMASK]sop<|user|>") and row["input"].endswith("<|assistant|>")


def test_a_prefix_beside_the_base(base, prefix, test_file, capsys):
    main(flags(base, test_file, "--ptuning_checkpoint", str(prefix), "--compare_base", "--output_dir", "scores"))
    results, predictions = read(Path("scores"))
    assert [row["base_prediction"] for row in predictions] == list(ANSWERS.values())
    assert results["base_metrics"]["exact_match"] == 100 > results["metrics"]["exact_match"]
    texts, golds = ([row[name] for row in predictions] for name in ("prediction", "gold"))
    assert results["metrics"] == pytest.approx(score(texts, golds)[0])
    assert results["settings"]["ptuning_checkpoint"] == str(prefix)
    printed = capsys.readouterr().out
    assert str(prefix) in printed and "base" in printed and "prefix" in printed


def test_the_newest_prefix_is_the_default_and_none_is_the_base(base, prefix, test_file, capsys):
    for place, run in enumerate(("old", "new")):
        folder = Path("output", run)
        shutil.copytree(prefix, folder)
        os.utime(folder / "prefix_config.json", (place, place))
    main(flags(base, test_file, "--max_predict_samples", "1"))
    results, predictions = read(Path("output/evaluation/new"))
    assert results["settings"]["ptuning_checkpoint"] == str(Path("output/new")) and len(predictions) == 1
    assert "trained last, in output/new" in capsys.readouterr().out
    main(flags(base, test_file, "--max_predict_samples", "1", "--ptuning_checkpoint", "none"))
    assert read(Path("output/evaluation/base"))[0]["settings"]["ptuning_checkpoint"] is None


def test_beams_history_source_prefix_and_left_out_rows(base, tmp_path):
    rows = [ROWS[0] | {"history": [["你是谁", "我是 abc"]]}, {"content": "", "summary": "无", "history": None}]
    main(flags(base, write(tmp_path / "rows.json", rows), "--output_dir", "scores", "--history_column", "history",
               "--source_prefix", "请问：", "--num_beams", "2"))  # fmt: skip
    results, predictions = read(Path("scores"))
    assert (results["counts"]["rows"], results["counts"]["used"], results["counts"]["one_sided"]) == (2, 1, 1)
    assert "我是 abc<|user|>" in predictions[0]["input"] and "请问：你是谁" in predictions[0]["input"]
    assert results["settings"]["decoding"] == "beam search"


def test_label_like_answers_get_an_accuracy(base, tmp_path):
    rows = [{"content": prompt, "summary": label} for prompt in ANSWERS for label in ("你好！", "我想去")]
    main(flags(base, write(tmp_path / "rows.json", rows), "--output_dir", "scores"))
    metrics = read(Path("scores"))[0]["metrics"]
    assert metrics["accuracy"] == pytest.approx(100 * 2 / 12)
    # Each label is predicted for two rows, right for one of them, and expected for six: 2 / (2 + 6).
    assert metrics["macro_f1"] == pytest.approx(25)


def test_official_flags_are_accepted(base, test_file, prefix, capfd):
    main(flags(base, test_file, "--do_predict", "--validation_file", str(test_file), "--overwrite_cache",
               "--overwrite_output_dir", "--predict_with_generate", "--pre_seq_len", "128", "--output_dir", "scores",
               "--per_device_eval_batch_size", "1", "--max_predict_samples", "1",
               "--ptuning_checkpoint", str(prefix)))  # fmt: skip
    assert len(read(Path("scores"))[1]) == 1


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, [], "does not exist"),
        ("", [], "is empty"),
        ('{"content": "好", "summary": "好"}\n{"content": \n', [], "test.json:2"),
        ('{"content": "好", "summary": "好"}', ["--prompt_column", "text"], "no column 'text'"),
        ('{"content": "好", "answer": "好"}', [], "no column 'summary'"),
        ('{"content": "", "summary": ""}', [], "1 empty"),
        ('{"content": "好", "summary": "好"}', ["--model_name_or_path", "./nowhere"], "No base at nowhere"),
        ('{"content": "好", "summary": "好"}', ["--ptuning_checkpoint", "./nowhere"], "No prefix at nowhere"),
        ('{"content": "好", "summary": "好"}', ["--max_source_length", "3"], "max_source_length"),
    ],
)
def test_faults_end_the_command_with_a_message(base, tmp_path, capfd, content, changes, message):
    path = tmp_path / "test.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    Path("scores").mkdir()
    Path("scores/metrics.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main([*flags(base, path, "--output_dir", "scores"), *changes])
    assert ended.value.code == 1
    assert message in capfd.readouterr().err
    assert Path("scores/metrics.json").read_text() == "{}" and len(list(Path("scores").iterdir())) == 1


def test_a_prefix_of_another_base_is_refused_with_the_way_out(prefix, test_file, tmp_path, capfd):
    other = make_base(tmp_path, steps=121)
    with pytest.raises(SystemExit):
        main(flags(other, test_file, "--ptuning_checkpoint", str(prefix)))
    assert "trained on another base" in capfd.readouterr().err
    shutil.copytree(prefix, Path("output/run"))
    with pytest.raises(SystemExit):
        main(flags(other, test_file))
    assert "ptuning_checkpoint none" in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--num_beams", "0"], ["--quantization_bit", "3"], ["--max_predict_samples", "0"], ["--promt_column", "x"]],
)
def test_wrong_flags_end_with_code_2(wrong):
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2


def test_defaults_are_the_bundled_data():
    args = EvaluationArguments()
    assert args.test_file == [str(ROOT / "data" / "news_topic" / "dev.json")]
    assert args.columns() == Columns()


def test_the_script_works_from_another_folder_and_passes_arguments_on(base, prefix, test_file, tmp_path):
    environment = dict(os.environ, MODEL=str(base), CHECKPOINT=str(prefix), TEST_FILE=str(test_file), SKIP_INSTALL="1",
                       MAX_TARGET_LENGTH="24", OUTPUT=str(tmp_path / "scores"), VIRTUAL_ENV=sys.prefix,
                       PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # fmt: skip
    command = ["bash", str(ROOT / "scripts" / "evaluate.sh"), "--max_predict_samples", "2", "--compare_base"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results, predictions = read(tmp_path / "scores")
    assert len(predictions) == 2 and results["base_metrics"]["exact_match"] == 100


def test_text_that_is_not_read_is_named(base, tmp_path, caplog):
    path = write(tmp_path / "noted.json", [{**row, "备注": "注"} for row in ROWS])
    main(flags(base, path, "--output_dir", str(tmp_path / "scores")))
    assert any(f"{len(ROWS)} rows of noted" in message and "'备注'" in message for message in caplog.messages)


def test_prompts_longer_than_the_base_give_one_warning(base, prefix, tmp_path, caplog):
    path = write(tmp_path / "long.json", [*ROWS, {"content": "问" * 300, "summary": "答"}])
    argv = flags(base, path, "--ptuning_checkpoint", str(prefix), "--compare_base", "--max_source_length", "400")
    main(argv)
    (found,) = [message for message in caplog.messages if "seq_length" in message]
    assert re.search(rf"1 of {len(ROWS) + 1} .*seq_length of 256 .*longest has \d+.*max_source_length", found)
