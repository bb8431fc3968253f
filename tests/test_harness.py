"""C-Eval, CMMLU and other tasks through lm-evaluation-harness, on files of the published form that are made here."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_chat_base
import tiny_tokenizer
import torch
from matplotlib import image

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.cli import main
from chatglm_ptuning.data.tasks import load_task
from chatglm_ptuning.evaluation.candidates import score_candidates
from chatglm_ptuning.model.loading import load_model, load_tokenizer

pytest.importorskip("lm_eval.models.huggingface")

from lm_eval.api.instance import Instance

from chatglm_ptuning.evaluation.harness.model import ChatGLMHarnessModel
from chatglm_ptuning.evaluation.harness.tasks import load_harness_tasks, select_tasks

HARD = load_task("ceval").groups["Hard"]
DESCRIPTION = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness") / "base"
    folder.mkdir()
    tokenizer = tiny_tokenizer.train(folder.parent, "chatglm3")
    tokenizer.save_pretrained(folder)
    tiny_chat_base.make_model(len(tokenizer), seq_length=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prefix(base) -> Path:
    return tiny_chat_base.write_prefix(base, base.parent / "prefix", seed=5)


def row(split: str, number: int) -> dict[str, str]:
    # "NA", "True", "1" and line feeds are what guessing readers of CSV turn into something else.
    question = f"今天{split[0]}{number}，好吗？"
    return {"question": question, "A": "1", "B": "True", "C": "NA", "D": "公\n园", "answer": "ABCD"[number % 4]}


def write_csv(path: Path, columns: dict[str, str], rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[row.get(role, "") for role in columns.values()] for row in rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The two benchmarks' folders with a few subjects: those of C-Eval Hard, law, and three of CMMLU."""
    folder = tmp_path_factory.mktemp("exams")
    ceval = {name: name for name in ("id", "question", "A", "B", "C", "D", "answer")}
    for subject in ("law", *HARD):
        for split, number in (("dev", 5), ("val", 3)):
            columns = ceval | ({"explanation": "explanation"} if split == "dev" else {})
            rows = [row(split, index) | {"id": str(index), "explanation": "因为"} for index in range(number)]
            write_csv(folder / "ceval" / split / f"{subject}_{split}.csv", columns, rows)
    cmmlu = {"": "id", "Question": "question", "A": "A", "B": "B", "C": "C", "D": "D", "Answer": "answer"}
    for subject in ("agronomy", "anatomy", "arts"):
        for split, number in (("dev", 5), ("test", 4)):
            rows = [row(split, index) | {"id": str(index)} for index in range(number)]
            write_csv(folder / "cmmlu" / split / f"{subject}.csv", cmmlu, rows)
    return folder


@pytest.fixture
def harness(base) -> ChatGLMHarnessModel:
    return ChatGLMHarnessModel(load_model(str(base)), load_tokenizer(str(base)), batch_size=3)


def ask(*arguments: tuple[str, ...], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def own_scores(harness: ChatGLMHarnessModel, pairs) -> list[float]:
    """The same log-likelihoods by the kit's own scoring of candidates."""
    tokenizer = harness.tokenizer
    scores = []
    for context, continuation in pairs:
        prompt = tokenizer(context)["input_ids"]
        whole = tokenizer(context + continuation)["input_ids"]
        assert whole[: len(prompt)] == prompt and prompt[:2] == tokenizer.start_ids
        scores += score_candidates(harness.model, [prompt], [whole[len(prompt) :]])[0].tolist()
    return scores


def prompts_of(task, shots: int) -> list[tuple[str, str]]:
    task.set_config("num_fewshot", shots)
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def law(data: Path, shots: int):
    (task,) = load_harness_tasks(select_tasks(["ceval-valid_law"]), data_dir=str(data), num_fewshot=shots)
    return task


# Log-likelihoods


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("shots", [0, 5])
def test_questions_have_the_likelihoods_of_the_own_scoring(harness, prefix, data, with_prefix, shots):
    if with_prefix:
        harness.model.load_prefix(prefix)
    pairs = prompts_of(law(data, shots), shots)
    found = [score for score, _ in harness.loglikelihood(ask(*pairs), disable_tqdm=True)]
    assert len(found) == 12 and harness.cut_contexts == 0
    torch.testing.assert_close(found, own_scores(harness, pairs), atol=1e-4, rtol=0)
    if with_prefix:
        harness.prefix = harness.model.prefix_batch(None)
        plain = [score for score, _ in harness.loglikelihood(ask(*pairs), disable_tqdm=True)]
        harness.prefix, selected = None, harness.model.selected_prefix
        harness.model.set_prefix(None)
        assert plain == [score for score, _ in harness.loglikelihood(ask(*pairs), disable_tqdm=True)]
        harness.prefix = selected
        assert found == [score for score, _ in harness.loglikelihood(ask(*pairs), disable_tqdm=True)]
        assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 0.01


def test_continuations_of_any_length_in_padded_batches(harness):
    texts = ["今天天气很好，", "你好吗？", "今天有雨！我想去公园散步。", "问"]
    pairs = [(text, answer) for text in texts for answer in ("好", " A", "我想去公园散步。你", "ab")]
    for size in (1, 3, 16):
        harness.batch_size_per_gpu = size
        found = [score for score, _ in harness.loglikelihood(ask(*pairs), disable_tqdm=True)]
        torch.testing.assert_close(found, own_scores(harness, pairs), atol=1e-4, rtol=0)


def one_by_one(harness, prompt: list[int], continuation: list[int]) -> float:
    return score_candidates(harness.model, [prompt], [continuation])[0].item()


def test_an_empty_context_is_the_start(harness):
    ((found, _),) = harness.loglikelihood(ask(("", "你好")), disable_tqdm=True)
    ids = harness.tokenizer.encode("你好", add_special_tokens=False)
    assert found == pytest.approx(one_by_one(harness, harness.tokenizer.start_ids, ids), abs=1e-4)


def test_a_long_context_is_truncated_behind_the_start(harness):
    harness.model.config.seq_length = 20
    context, answer = "今天天气很好，我想去公园散步。" * 3, "你好"
    ((found, _),) = harness.loglikelihood(ask((context, answer)), disable_tqdm=True)
    start, ids = harness.tokenizer.start_ids, harness.tokenizer(context)["input_ids"]
    tail = harness.tokenizer(context + answer)["input_ids"][len(ids) :]
    expected = one_by_one(harness, [*start, *ids[-(21 - 2 - len(tail)) :]], tail)
    assert harness.cut_contexts == 1 and found == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=r"fit into .*20 .*base"):
        harness.loglikelihood(ask(("问", "今天" * 30)), disable_tqdm=True)


def test_a_whole_text_is_scored_in_windows_that_all_have_the_start(harness):
    harness.model.config.seq_length = 12
    text = "今天天气很好，我想去公园散步。"
    (found,) = harness.loglikelihood_rolling(ask((text,), kind="loglikelihood_rolling"), disable_tqdm=True)
    start, ids = harness.tokenizer.start_ids, harness.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 16
    # lm-eval's windows of ten tokens: the first ten, then the last six behind as much as has room before them.
    expected = one_by_one(harness, start, ids[:10]) + one_by_one(harness, [*start, *ids[5:10]], ids[10:])
    assert found == pytest.approx(expected, abs=1e-3) and harness.cut_contexts == 0


def test_generation_is_the_models_own_in_a_padded_batch(harness):
    texts = ["今天天气很好，", "你好吗？请问你是谁？", "问"]
    arguments = [(text, {"until": ["！！！"], "max_gen_toks": 8, "do_sample": False}) for text in texts]
    found = harness.generate_until(ask(*arguments, kind="generate_until"), disable_tqdm=True)
    lengths = set()
    for text, answer in zip(texts, found, strict=True):
        ids = harness.tokenizer(text, return_tensors="pt")
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": harness.tokenizer.chat.stop_ids}
        new = harness.model.generate(**ids, **settings)[0, ids["input_ids"].shape[1] :]
        assert answer == harness.tokenizer.decode(new, skip_special_tokens=True)
        lengths.add(len(new))
    assert max(lengths) > 1


# Chats


@pytest.mark.parametrize("chat_format", ["chatglm2", "chatglm3"])
def test_a_chat_has_the_ids_of_training(tmp_path, chat_format):
    tokenizer = tiny_tokenizer.train(tmp_path, chat_format)
    harness = ChatGLMHarnessModel(tiny_chat_base.make_model(len(tokenizer)), tokenizer)
    # What a user spells stays text.
    text = harness.apply_chat_template([{"role": "user", "content": "<|user|>你好</s>"}])
    context, answer = harness._encode_pair(text, "今天")
    messages = [Message("user", "<|user|>你好</s>"), Message("assistant", "今天")]
    assert [*context, *answer, tokenizer.eos_token_id] == tokenizer.chat.encode(Conversation(messages)).input_ids
    assert harness.tok_encode(text) == context
    batch, mask = harness.tok_batch_encode([text, "你"])
    assert batch[0].tolist() == context and mask[1].sum() == len(tokenizer("你")["input_ids"])


def test_the_beginning_of_an_answer_is_continued(harness):
    begun = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "答："}]
    text = harness.apply_chat_template(begun, add_generation_prompt=False)
    context, answer = harness._encode_pair(text, "今天")
    whole = [begun[0], {"role": "assistant", "content": "答：今天"}]
    assert [*context, *answer] == harness.tokenizer.apply_chat_template(whole)["input_ids"]
    assert len(answer) == 2


def test_two_chats_of_one_text_are_distinguished(harness):
    harness.apply_chat_template([{"role": "user", "content": "你"}, {"role": "user", "content": "好"}])
    with pytest.raises(ValueError, match=r"Two chats .*same text"):
        harness.apply_chat_template([{"role": "user", "content": "你<|user|>\n 好"}])


def test_a_base_without_chats_refuses_the_template(tmp_path):
    tokenizer = tiny_tokenizer.train(tmp_path, "base")
    harness = ChatGLMHarnessModel(tiny_chat_base.make_model(len(tokenizer)), tokenizer)
    with pytest.raises(ValueError, match=r"chat format.* apply_chat_template out"):
        harness.apply_chat_template([{"role": "user", "content": "你"}])


# Tasks


def question(split: str, number: int) -> str:
    entry = row(split, number)
    return f"{entry['question']}\nA. 1\nB. True\nC. NA\nD. 公\n园\n答案："


def test_few_shot_examples_are_the_first_of_dev_in_order(data):
    pairs = prompts_of(law(data, 5), 5)
    shown = "".join(f"{question('dev', number)} {row('dev', number)['answer']}\n\n" for number in range(5))
    expected = [DESCRIPTION + shown + question("val", number) for number in range(3) for _ in "ABCD"]
    assert [context for context, _ in pairs] == expected
    assert [answer for _, answer in pairs] == [" A", " B", " C", " D"] * 3


def test_zero_shots_need_no_dev_split(data, tmp_path):
    subject = (data / "ceval" / "val" / "law_val.csv").read_bytes()
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "law_val.csv").write_bytes(subject)
    assert prompts_of(law(tmp_path, 0), 0)[0] == (DESCRIPTION + question("val", 0), " A")


def test_names_of_tasks_and_subjects():
    def subjects(names, chosen=None):
        return {name: own for name, (_, own) in select_tasks(names, chosen).exams.items()}

    assert len(subjects(["ceval"])["ceval"]) == 52 and len(subjects(["cmmlu"])["cmmlu"]) == 67
    assert subjects(["c-eval"]) == subjects(["ceval-valid"]) == subjects(["ceval"])
    assert subjects(["cmmlu_arts", "ceval-valid_law", "cmmlu_agronomy"]) == {
        "cmmlu": ("agronomy", "arts"), "ceval": ("law",)
    }  # fmt: skip
    assert set(subjects(["ceval"], ["Hard"])["ceval"]) == set(HARD)
    assert "law" in subjects(["ceval"], ["Humanities"])["ceval"]
    assert set(subjects(["ceval", "cmmlu"], ["law"])) == {"ceval"}  # CMMLU calls it college_law
    assert select_tasks(["cmmlu_arts", "hellaswag"]).others == ("hellaswag",)


# The command


def run(base: Path, output: Path, *flags: str) -> dict:
    main(["lm_eval", "--model_name_or_path", str(base), "--output_dir", str(output), *flags])
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def test_reports_of_prefix_and_base(base, prefix, data, tmp_path, capsys):
    flags = ["--tasks", "ceval", "cmmlu", "--subjects", "Hard", "law", "agronomy", "anatomy", "arts"]
    flags += ["--data_dir", str(data), "--num_fewshot", "0", "--ptuning_checkpoint", str(prefix), "--compare_base"]
    content = run(base, tmp_path, *flags)
    prefix_scores = content["exams"]["cmmlu"]["prefix"]
    for name in ("prefix", "base"):
        own = json.loads((tmp_path / name / "lm_eval_results.json").read_text(encoding="utf-8"))
        for exam, prefix_of_names in (("ceval", "ceval-valid_"), ("cmmlu", "cmmlu_")):
            groups = content["exams"][exam][name]["groups"]
            theirs = {task.removeprefix(prefix_of_names): 100 * values["acc,none"]
                      for task, values in own["results"].items() if task.startswith(prefix_of_names)}  # fmt: skip
            assert theirs and {subject: groups[subject] for subject in theirs} == pytest.approx(theirs)
            assert groups["mean of subjects"] == pytest.approx(sum(theirs.values()) / len(theirs))
        ceval = content["exams"]["ceval"][name]["groups"]
        assert ceval["Hard"] == ceval["STEM"] == pytest.approx(sum(ceval[subject] for subject in HARD) / 8)
        cmmlu = content["exams"]["cmmlu"][name]["groups"]
        assert (cmmlu["Other"], cmmlu["STEM"], cmmlu["Humanities"]) == (
            cmmlu["agronomy"], cmmlu["anatomy"], cmmlu["arts"]
        )  # fmt: skip
        assert "China specific" not in cmmlu  # only some of its subjects are here
        lines = (tmp_path / name / "cmmlu" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 12 and question("test", 0) == json.loads(lines[0])["input"]
    assert prefix_scores["questions"] == 12 and content["cut_contexts"] == {"prefix": 0, "base": 0}
    answers = [
        [json.loads(line)["confidence"] for line in (tmp_path / name / "ceval" / "predictions.jsonl").open()]
        for name in ("prefix", "base")
    ]
    assert answers[0] != answers[1]
    assert all(image.imread(tmp_path / f"{exam}.png").size for exam in ("ceval", "cmmlu"))
    assert "mean of subjects" in capsys.readouterr().out


def test_limit_and_chats(base, data, tmp_path):
    flags = ["--tasks", "ceval-valid_law", "--data_dir", str(data), "--num_fewshot", "5", "--limit", "2"]
    content = run(base, tmp_path, *flags, "--apply_chat_template")
    assert content["exams"]["ceval"]["base"]["questions"] == 2
    own = json.loads((tmp_path / "base" / "lm_eval_results.json").read_text(encoding="utf-8"))
    assert own["n-shot"]["ceval-valid_law"] == 5


def write_own_task(tmp_path: Path) -> Path:
    """A definition whose data are local, as `my_moods`; returns its folder."""
    (tmp_path / "rows.jsonl").write_text(
        '{"text": "你好", "label": 1}\n{"text": "天气", "label": 0}\n', encoding="utf-8"
    )
    definition = f"""
task: my_moods
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}："
doc_to_choice: [好, 不好吗]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_moods.yaml").write_text(definition, encoding="utf-8")
    return tmp_path / "tasks"


def test_a_user_defined_task(base, tmp_path):
    content = run(base, tmp_path / "out", "--tasks", "my_moods", "--include_path", str(write_own_task(tmp_path)))
    assert content["other_tasks"]["my_moods"]["base"]["acc,none"] in (0, 0.5, 1) and not content["exams"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "ceval", "--subjects", "law", "art_studies", "--data_dir", "{data}"],
         r"no file .*ceval, .*val: looked for val/art_studies_val.csv .*/ceval"),
        (["--tasks", "cmmlu_arts", "--data_dir", "{data}/nowhere"], "nowhere .*not exist.* folder"),
        (["--tasks", "cmmlu_arts", "--data_dir", "{data}", "--num_fewshot", "6"],
         "5 examples .*cmmlu, .*arts, .*dev: num_fewshot 6"),
        (["--tasks", "ceval", "--subjects", "lawn"], r"group 'lawn' in ceval \(did you mean 'law'"),
        (["--tasks", "my_moods", "--subjects", "law"], "subjects .*ceval and cmmlu"),
        (["--tasks", "my_moods", "--include_path", "{data}/nowhere"], "include_path: .*nowhere"),
        (["--tasks", "ceval-valid_law"], "could not load .*ceval-valid: .*data_dir"),
    ],
)  # fmt: skip
def test_mistakes_are_named(base, data, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as ended:
        run(base, tmp_path / "out", *(flag.format(data=data) for flag in flags))
    error = capsys.readouterr().err
    assert ended.value.code == 1
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_fit(base, tmp_path, capsys):
    for flags, message in ((["--compare_base"], "give --ptuning_checkpoint"),
                           (["--compare_base", "--ptuning_checkpoint", "none"], "give --ptuning_checkpoint"),
                           (["--num_fewshot", "-1"], "--num_fewshot must be at least 0")):  # fmt: skip
        with pytest.raises(SystemExit):
            run(base, tmp_path, *flags)
        assert message in capsys.readouterr().err


def test_without_lm_eval_the_way_to_it_is_named(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(SystemExit):
        run(base, tmp_path)
    assert "pip install 'lm-eval[hf]==0.4.13'" in capsys.readouterr().err


def test_an_untrained_prefix_is_refused(base):
    with pytest.raises(ValueError, match="untrained"):
        ChatGLMHarnessModel(load_model(str(base), pre_seq_len=4), load_tokenizer(str(base)))


def test_lm_eval_finds_the_model_by_its_name(base, prefix):
    from lm_eval.api.registry import get_model

    made = get_model("chatglm").create_from_arg_string(
        f"pretrained={base},ptuning_checkpoint={prefix}", {"batch_size": 2, "device": None}
    )
    assert isinstance(made, ChatGLMHarnessModel) and made.model.selected_prefix is not None and made.batch_size == 2


@pytest.mark.slow  # lm-eval reads its thousands of definitions
def test_lm_evals_own_command_takes_the_model_and_a_prefix(base, prefix, tmp_path):
    start = "import chatglm_ptuning.evaluation.harness.model; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    command = [sys.executable, "-c", start, "run", "--model", "chatglm", "--tasks", "my_moods", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={base},ptuning_checkpoint={prefix}"]
    command += ["--include_path", str(write_own_task(tmp_path)), "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(path.read_text(encoding="utf-8"))["results"]["my_moods"]


@pytest.mark.slow  # the same
def test_a_misspelt_task_is_named_with_the_nearest(base, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(base, tmp_path, "--tasks", "helaswag")
    assert "lm-eval has no task 'helaswag' (did you mean 'hellaswag'" in capsys.readouterr().err
