"""`train --task` and `evaluate --task` as a user runs them, on tiny files in published form."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
from json_lines import write_rows
from safetensors.torch import load_file
from task_runs import MOODS, TASKS, TEXTS, evaluate, flags, read, train, write_tasks

from chatglm_ptuning.evaluation import run as evaluation
from chatglm_ptuning.training import run as training


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """Trains a head once for all tests: its folder and its results."""
    made: dict[str, tuple[Path, dict]] = {}

    def run(head: str) -> tuple[Path, dict]:
        if head not in made:
            folder = tmp_path_factory.mktemp("runs") / head
            own = [] if head == "multi_label" else ["--head", head]
            more = ["--do_eval", "--do_predict", "--predict_split", "dev", *own]
            made[head] = folder, train(base, data, TASKS[head][0], folder, *more)
        return made[head]

    return run


def test_scores_are_kept_only_with_their_files(base, data, tmp_path, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("chatglm_ptuning.training.run.write_report", no_room)
    asked = flags(base, data, "mood.yaml", "--tuning", "none", "--head", "generation", "--do_predict")
    with pytest.raises(SystemExit):
        training.main([*asked, "--predict_split", "dev", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "all_results.json").exists()


@pytest.mark.parametrize("head", TASKS)
def test_a_head_learns_its_rows_and_evaluates_to_the_same(base, data, runs, head, tmp_path, capsys):
    folder, results = runs(head)
    task, metric, best = TASKS[head]
    assert results[f"predict_{metric}"] == results[f"eval_{metric}"] == (best or results[f"eval_{metric}"])
    history = json.loads((folder / "trainer_state.json").read_text("utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < (0.3 if best else 0.6) * losses[0]
    metadata = json.loads((folder / "prefix_config.json").read_text("utf-8"))
    assert metadata["task"] == task.removesuffix(".yaml") and metadata["training"]["split"] == "train"
    assert metadata["head"] == ("sequence_classification" if head == "multi_label" else head)
    names = {name.split(".")[0] for name in load_file(folder / "prefix_model.safetensors")}
    linear = {"generation": set(), "question_answering": {"qa_outputs"}}.get(head, {"classifier_head"})
    assert names == {"transformer"} | linear
    assert (metadata["labels"] is None) == (head in ("generation", "question_answering"))

    capsys.readouterr()
    evaluate(
        base,
        data,
        task,
        tmp_path / "again",
        "--split",
        "dev",
        "--ptuning_checkpoint",
        folder,
        "--per_device_eval_batch_size",
        2,
    )
    assert "LOAD REPORT" not in "".join(capsys.readouterr())
    ours, theirs = (
        json.loads((place / "metrics.json").read_text("utf-8")) for place in (folder / "predict", tmp_path / "again")
    )
    assert ours["metrics"] == theirs["metrics"] and ours["intervals"] == theirs["intervals"]
    assert ours["settings"]["split"] == theirs["settings"]["split"] == "dev"
    assert ours["settings"]["head"] == theirs["settings"]["head"] == metadata["head"]
    for left, right in zip(
        read(folder / "predict" / "predictions.jsonl"), read(tmp_path / "again" / "predictions.jsonl"), strict=True
    ):
        assert {**left, "confidence": 0} == {**right, "confidence": 0}
        assert left["confidence"] == pytest.approx(right["confidence"], abs=1e-4)
        gold = left["gold"][0] if head == "question_answering" else left["gold"]
        assert (left["prediction"] == gold) == (left["score"] == 1) and (left["score"] == 1 or not best)
    wrong = [row["id"] for row in read(folder / "predict" / "predictions.jsonl") if row["score"] < 1]
    assert sorted(row["id"] for row in read(folder / "predict" / "worst_errors.jsonl")) == sorted(wrong)
    picture = {"token_classification": "entities.png", "multi_label": "labels.png", "question_answering": None}
    name = picture.get(head, "confusion_matrix.png")
    assert sorted(path.name for path in (folder / "predict").glob("*.png")) == ([name] if name else [])
    if name:
        assert (folder / "predict" / name).read_bytes().startswith(b"\x89PNG")


def test_a_split_without_labels_gives_predictions_and_a_submission(base, data, runs, tmp_path):
    for head, name in (("sequence_classification", "mood_predict.json"), ("multi_label", "moods_predict.json")):
        out = tmp_path / head
        evaluate(base, data, TASKS[head][0], out, "--ptuning_checkpoint", runs(head)[0])
        assert sorted(path.name for path in out.iterdir()) == sorted([name, "predictions.jsonl"])
        gold = read(runs(head)[0] / "predict" / "predictions.jsonl")
        assert read(out / name) == [{"id": 10 + i, "label": row["gold"]} for i, row in enumerate(gold)]
    out = tmp_path / "cluener"
    evaluate(base, data, "cluener", out, "--ptuning_checkpoint", runs("token_classification")[0])
    assert read(out / "cluener_predict.json")[0] == {"id": 0, "label": {"address": {"公园": [[3, 4]]}}}
    assert not (out / "metrics.json").exists()
    part = tmp_path / "part"
    evaluate(base, data, "mood.yaml", part, "--max_predict_samples", 2, "--ptuning_checkpoint", runs("generation")[0])
    assert [path.name for path in part.iterdir()] == ["predictions.jsonl"]


def test_a_duplicate_id_is_reported_before_the_base_is_loaded(base, data, runs, tmp_path, capsys):
    folder = tmp_path / "files"
    moods = [{"number": number, "message": text, "mood": "sad"} for number, text in zip("aba", TEXTS, strict=False)]
    write_rows(folder / "dev.jsonl", *moods)
    write_rows(folder / "train.jsonl", *moods)
    write_rows(folder / "test.jsonl", *({name: row[name] for name in ("number", "message")} for row in moods))
    (folder / "mood.yaml").write_text(MOODS, "utf-8")
    nowhere = tmp_path / "no base"
    twice = r"test.jsonl:3: duplicate id 'a', first at "
    said = refusal(capsys, evaluation.main, flags(nowhere, folder, "mood.yaml", "--ptuning_checkpoint", "none"))
    assert twice in said and "test.jsonl:1, but" in said and "max_predict_samples 3" in said
    start = [*flags(base, folder, "mood.yaml"), "--output_dir", str(tmp_path / "run"), "--do_train", "--do_predict"]
    assert twice in refusal(capsys, training.main, start)
    tuned = ["--ptuning_checkpoint", runs("sequence_classification")[0]]
    evaluate(base, folder, "mood.yaml", tmp_path / "part", "--max_predict_samples", 3, *tuned)
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["predictions.jsonl"]
    evaluate(base, folder, "mood.yaml", tmp_path / "dev", "--split", "dev", *tuned)
    assert (tmp_path / "dev" / "metrics.json").exists() and not (tmp_path / "dev" / "mood_predict.json").exists()


def test_bad_rows_are_skipped_and_then_there_is_no_submission(base, tmp_path, capsys, caplog):
    data = write_tasks(tmp_path / "data")
    with (data / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"number": 9}\n')
    command = ["--head", "generation", "--split", "test", "--ptuning_checkpoint", "none"]
    with pytest.raises(SystemExit):
        evaluate(base, data, "mood.yaml", tmp_path / "no", *command)
    assert f"{data / 'test.jsonl'}:{len(TEXTS) + 1}: there is no field 'message'" in capsys.readouterr().err
    evaluate(base, data, "mood.yaml", tmp_path / "out", *command, "--skip_bad_rows", "1")
    assert "1 bad rows of mood, split test, were skipped" in caplog.text
    assert len(read(tmp_path / "out" / "predictions.jsonl")) == len(TEXTS)
    assert not (tmp_path / "out" / "mood_predict.json").exists()


def test_compare_base_scores_the_base_and_the_prefix(base, data, runs, tmp_path):
    more = ["--split", "dev", "--compare_base", "--ptuning_checkpoint", runs("generation")[0]]
    evaluate(base, data, "mood.yaml", tmp_path / "both", *more)
    evaluate(base, data, "mood.yaml", tmp_path / "plain", "--split", "dev", "--ptuning_checkpoint", "none")
    plain, beside, tuned = (json.loads((tmp_path / name / "metrics.json").read_text("utf-8"))["metrics"]["accuracy"]
                            for name in ("plain", "both/base", "both"))  # fmt: skip
    assert plain == beside
    assert tuned == runs("generation")[1]["predict_accuracy"]


def refusal(capsys, main, argv) -> str:
    with pytest.raises(SystemExit):
        main(argv)
    return capsys.readouterr().err


def test_a_mismatch_is_refused_naming_both_sides(base, data, runs, tmp_path, capsys):
    linear, tags = runs("sequence_classification")[0], runs("token_classification")[0]
    run = evaluation.main
    said = refusal(capsys, run, flags(base, data, "mood.yaml", "--ptuning_checkpoint", tags))
    assert "trained with the head token_classification, for cluener" in said and "mood takes sequence_class" in said
    said = refusal(capsys, run, flags(base, data, "mood.yaml", "--ptuning_checkpoint", linear, "--head", "generation"))
    assert "with the head sequence_classification, not with generation" in said
    other = data / "other.yaml"
    other.write_text(MOODS.replace("name: mood", "name: other").replace("sad: 有雨", "sad: 有雨, calm: 好"), "utf-8")
    said = refusal(capsys, run, flags(base, data, "other.yaml", "--ptuning_checkpoint", linear))
    assert "labels happy, sad (task mood)" in said and "other has happy, sad, calm" in said
    assert "cannot solve mood" in refusal(
        capsys, run, flags(base, data, "mood.yaml", "--ptuning_checkpoint", "none", "--head", "token_classification")
    )
    assert "has no token classification head" in refusal(
        capsys, run, flags(base, data, "cluener", "--ptuning_checkpoint", "none")
    )
    assert "has no sequence classification head" in refusal(
        capsys, run, flags(base, data, "mood.yaml", "--ptuning_checkpoint", linear, "--compare_base")
    )
    without = ["--model_name_or_path", str(base), "--task", "mood.yaml"]
    assert "--task needs --task_data" in refusal(capsys, run, without)
    assert "belongs to a --task" in refusal(capsys, run, ["--split", "dev"])
    out = ["--output_dir", str(tmp_path / "run")]
    start = training.main
    assert "--task needs --task_data" in refusal(capsys, start, [*without, *out, "--do_train"])
    assert "belong to a --task" in refusal(capsys, start, [*out, "--do_train", "--train_split", "dev"])
    said = refusal(capsys, start, [*flags(base, data, "moods.yaml"), *out, "--do_train", "--head", "generation"])
    assert "head generation cannot solve moods; sequence_classification can" in said
    said = refusal(
        capsys, start, [*flags(base, data, "mood.yaml"), *out, "--do_train", "--do_predict", "--compare_base"]
    )
    assert "--compare_base: the base has no sequence classification head" in said  # before anything is trained
    assert "is untrained: its values are random" in refusal(
        capsys, start, [*flags(base, data, "mood.yaml"), *out, "--do_predict"]
    )


def test_an_adapter_of_peft_answers_a_task(base, data, tmp_path):
    """One without this kit's record, which would say its head."""
    run = tmp_path / "run"
    train(base, data, "mood.yaml", run, "--tuning", "lora", "--head", "generation", steps=5)
    evaluate(base, data, "mood.yaml", tmp_path / "ours", "--split", "dev", "--ptuning_checkpoint", run)
    (run / "tuning.json").unlink()
    evaluate(base, data, "mood.yaml", tmp_path / "theirs", "--split", "dev", "--ptuning_checkpoint", run,
             "--head", "generation")  # fmt: skip
    ours, theirs = (read(tmp_path / name / "predictions.jsonl") for name in ("ours", "theirs"))
    assert ours == theirs


def test_results_cannot_go_into_a_file(base, data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        for main in (training.main, evaluation.main):
            said = refusal(capsys, main, flags(base, data, "mood.yaml", "--output_dir", path))
            assert f"{path}: {tmp_path / 'file'} is a file" in said and "another folder" in said


def test_a_run_on_another_task_does_not_resume_in_the_same_folder(base, data, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    train(base, data, "mood.yaml", run, "--head", "sequence_classification", "--save_strategy", "steps", steps=1)
    other = (data / "mood.yaml").read_text("utf-8").replace("name: mood", "name: weather")
    (data / "weather.yaml").write_text(other, "utf-8")
    head = ("--head", "sequence_classification")
    before = (run / "prefix_model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        train(base, data, "weather.yaml", run, *head, steps=2)
    said = capsys.readouterr().err
    assert "checkpoint-1 is from a run on the task mood (head sequence_classification, labels happy, sad)" in said
    assert "this one is on the task weather" in said and "--overwrite_output_dir" in said
    assert (run / "prefix_model.safetensors").read_bytes() == before
    evaluate(base, data, "weather.yaml", tmp_path / "report", "--ptuning_checkpoint", run)
    assert "was trained for the task mood, and is used for weather" in caplog.text
    train(base, data, "weather.yaml", run, *head, "--overwrite_output_dir", steps=1)
    assert json.loads((run / "prefix_config.json").read_text("utf-8"))["task"] == "weather"


def test_a_prompt_that_differs_from_training_gives_a_warning(base, data, runs, tmp_path, caplog):
    run = runs("sequence_classification")[0]
    evaluate(base, data, "mood.yaml", tmp_path / "same", "--ptuning_checkpoint", run)
    assert "with the prompt" not in caplog.text
    (data / "reworded.yaml").write_text(MOODS.replace("问：{text}答：", "{text}，{labels}？"), "utf-8")
    evaluate(base, data, "reworded.yaml", tmp_path / "other", "--ptuning_checkpoint", run)
    assert "was trained with the prompt '问：{text}答：'; now it is '{text}，很好、有雨？'." in caplog.text


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_score_candidates_is_refused_before_the_base_is_loaded(
    base, data, tmp_path, capsys, attention
):
    tokenizer_alone = tmp_path / "base"
    shutil.copytree(base, tokenizer_alone, ignore=shutil.ignore_patterns("*.safetensors"))
    words = ["--do_train", "--output_dir", tmp_path / "run", "--attn_implementation", attention]
    argv = flags(tokenizer_alone, data, "mood.yaml", *words)
    candidates = f"--attn_implementation {attention} does not work for mood with the head generation"
    for what in ("--do_eval", "--do_predict"):
        said = refusal(capsys, training.main, [*argv, "--head", "generation", what, "--predict_split", "dev"])
        assert candidates in " ".join(said.split())
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"tasks: {{mood: {{task: {data}/mood.yaml, task_data: {data}, head: generation}}}}", "utf-8")
    mixed = ["--task_mixture", mixture, "--model_name_or_path", tokenizer_alone, "--do_eval", *words]
    assert candidates in " ".join(refusal(capsys, training.main, list(map(str, mixed))).split())
    linear = refusal(capsys, training.main, [*argv, "--head", "sequence_classification", "--do_eval"])
    assert candidates not in " ".join(linear.split())  # but that there are no weights


def test_evaluation_uses_the_token_unit_of_training(base, data, tmp_path):
    train(base, data, "cluener", tmp_path / "run", "--token_unit", "characters", steps=1)
    for more, unit in (([], "characters"), (["--token_unit", "pieces"], "pieces")):
        evaluate(
            base, data, "cluener", tmp_path / unit, "--split", "dev", "--ptuning_checkpoint", tmp_path / "run", *more
        )
        assert json.loads((tmp_path / unit / "metrics.json").read_text("utf-8"))["settings"]["token_unit"] == unit


def test_results_are_named_after_task_and_split_and_a_submission_after_its_training_split(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATGLM_PTUNING_OUTPUT", "output")
    data = tmp_path / "bustm"
    data.mkdir()
    rows = [{"id": i, "sentence1": "今天有雨", "sentence2": text, "label": str(i % 2)} for i, text in enumerate(TEXTS)]
    for split in ("train_2", "dev_2", "test_public"):
        write_rows(data / f"{split}.json", *rows)
    training.main([
        *flags(base, data, "bustm"), "--do_train", "--train_split", "train_2", "--output_dir", "output/run",
        "--max_steps", "1", "--disable_tqdm", "true", "--do_predict", "--predict_split", "test_public",
    ])  # fmt: skip
    evaluation.main(flags(base, data, "bustm", "--split", "test_public"))
    found = Path("output/evaluation/run/fewclue_bustm-test_public/bustm_predict_2.json")
    assert len(read(found)) == 6 and read(found) == read(Path("output/run/predict/bustm_predict_2.json"))
