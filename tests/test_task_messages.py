"""What readers of tasks take beside the plain form of their files, and what they say about what they refuse."""

import json
from pathlib import Path

import pytest

from chatglm_ptuning.cli import main
from chatglm_ptuning.data.tasks import load_task, read_examples


def lines(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


# Lines of tokens and tags


@pytest.mark.parametrize("mark", ["\t", " ", "  "])
def test_columns_between_token_and_tag_are_left_out(tmp_path, mark):
    rows = [["-DOCSTART-", "-X-", "-X-", "O"], [], ["[", "PU", "X", "O"], ["王", "NN", "X", "B-PER"], [],
            ["沪", "NR", "X", "B-LOC"]]  # fmt: skip
    text = "".join(mark.join(row).replace("\t\t", "\t") + "\n" for row in rows)
    task = load_task("msra_ner")
    for name, split in (("train.txt", "train"), ("test.txt", "test")):
        (tmp_path / name).write_text(text, "utf-8")
        examples = read_examples(task, tmp_path, split)
        assert [(example.tokens, example.tags) for example in examples] == [
            (("[", "王"), ("O", "B-PER")), (("沪",), ("B-LOC",)),
        ]  # fmt: skip


def test_a_token_may_be_a_space_or_a_tab(tmp_path):
    text = "王  B-PER\n\u3000 O\n  O\n \tO\n\t\tO\n\u3000\tO\n"
    (tmp_path / "train.txt").write_text(text, "utf-8")
    (example,) = read_examples(load_task("msra_ner"), tmp_path, "train")
    assert example.tokens == ("王", "\u3000", " ", " ", "\t", "\u3000")


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "感 B-PER NN X\n", r"train.txt:1: 4 columns; expected a token and a tag\. .* found '感 B-PER NN X'"),
        ("train", "感 O\n冒 NN X O\n", r"train.txt:2: 4 columns; expected a token and a tag\..* as many \(2\)"),
        ("train", "感\tNN\tX\tO\n冒\tO\n", r"train.txt:2: 2 columns; .* as many \(4\)"),
        ("test", "感 NN X\n冒 NN X\n", r"test.txt:1: 3 columns; expected a token and a tag"),
    ],
)
def test_other_columns_are_refused(tmp_path, split, text, message):
    (tmp_path / f"{split}.txt").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_examples(load_task("msra_ner"), tmp_path, split)


# The command


def test_entities_of_tokens_are_shown_whole(tmp_path, capsys):
    lines(tmp_path / "train.jsonl", {"tokens": ["Barack", "Obama", "来了"], "ner_tags": ["B-PER", "I-PER", "O"]})
    main(["tasks", "show", "msra_ner", str(tmp_path / "train.jsonl"), "--split", "train"])
    assert "answer: BarackObama (PER)" in capsys.readouterr().out
