import json
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.training.arguments import (
    RETIRED_FLAGS,
    DataArguments,
    ModelArguments,
    PrefixTrainingArguments,
)

# The flags that the official ChatGLM2-6B ptuning scripts train.sh, train_chat.sh and evaluate.sh pass.
OFFICIAL_TRAIN = """--do_train --train_file AdvertiseGen/train.json --validation_file AdvertiseGen/dev.json
 --preprocessing_num_workers 10 --prompt_column content --response_column summary --overwrite_cache
 --model_name_or_path THUDM/chatglm2-6b --output_dir output/adgen --overwrite_output_dir --max_source_length 64
 --max_target_length 128 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
 --gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
 --learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""
OFFICIAL_CHAT = OFFICIAL_TRAIN + " --history_column history"
OFFICIAL_EVALUATE = """--do_predict --validation_file dev.json --test_file dev.json --overwrite_cache
 --prompt_column content --response_column summary --model_name_or_path THUDM/chatglm2-6b
 --ptuning_checkpoint output/adgen/checkpoint-3000 --output_dir output/adgen --overwrite_output_dir
 --max_source_length 64 --max_target_length 64 --per_device_eval_batch_size 1 --predict_with_generate
 --pre_seq_len 128 --quantization_bit 4"""


def parse_train(text):
    return parse_arguments(
        "train", "", (ModelArguments, DataArguments, PrefixTrainingArguments), text.split(), RETIRED_FLAGS
    )


@pytest.mark.parametrize("flags", [OFFICIAL_TRAIN, OFFICIAL_CHAT, OFFICIAL_EVALUATE])
def test_the_official_scripts_flags_keep_their_meaning(flags):
    model, data, training = parse_train(flags)
    assert (model.pre_seq_len, model.quantization_bit) == (128, 4)
    assert (data.prompt_column, data.response_column, data.max_source_length) == ("content", "summary", 64)
    assert training.predict_with_generate and training.overwrite_output_dir
    if training.do_train:
        assert (training.max_steps, training.save_steps, training.logging_steps) == (3000, 1000, 10)
        assert (training.learning_rate, training.gradient_accumulation_steps) == (2e-2, 16)
        assert data.preprocessing_num_workers == 10
    assert data.history_column == ("history" if "history" in flags else None)


@pytest.mark.parametrize("flag", sorted(RETIRED_FLAGS))
def test_a_retired_flag_is_accepted_with_or_without_a_value(flag):
    for words in (f"--{flag}", f"--{flag} value", f"--{flag}=value"):
        _, data, training = parse_train(f"{words} --do_train --max_source_length 33")
        assert training.do_train and data.max_source_length == 33


def test_an_unknown_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as error:
        parse_train("--do_train --pre_seq_length 8")
    assert error.value.code == 2
    assert re.search("--pre_seq_length .did you mean --pre_seq_len", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pre_seq_len 0", "--pre_seq_len .*at least 1.* 0"),
        ("--quantization_bit 3", "--quantization_bit .*0, 4, 8.*'3'"),
        ("--prefix_init warm", "--prefix_init .*data, text, small, official.*'warm'"),
        ("--prefix_init text", "--prefix_init .*--init_prefix_text"),
        ("--max_source_length 1", "--max_source_length .*at least 2.* 1"),
        ("--warmup_ratio 0.1", "--warmup_ratio .*--warmup_steps, .*share of all steps"),
        ("--no_cuda", "--no_cuda .*--use_cpu"),
        ("--seed 3 stray", "unexpected .*stray"),
    ],
)
def test_bad_values_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_train(flags)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@dataclass
class Two:
    number: int = field(default=1, metadata={"help": "a number"})
    switch: bool = field(default=False, metadata={"help": "a switch"})
    names: str | None = field(default=None, metadata={"help": "a name"})


def test_flags_come_from_a_file_and_the_command_line_overrides_them(tmp_path):
    yaml = tmp_path / "run.yaml"
    yaml.write_text("number: 5\nswitch: true\nnames: 名字\n", "utf-8")
    (parsed,) = parse_arguments("x", "", [Two], ["--config", str(yaml)])
    assert parsed == Two(5, True, "名字")
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps({"number": 6, "names": None, "switch": []}), "utf-8")
    (parsed,) = parse_arguments("x", "", [Two], [f"--config={as_json}", "--number", "7"])
    assert parsed == Two(7, False, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("numbr: 3", "--numbr .did you mean --number"),
        ("- 3", "must be a mapping"),
        ("a: [", "is malformed"),
        (None, "cannot read .*configuration"),
    ],
)
def test_a_bad_file_is_named(content, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(SystemExit):
        parse_arguments("x", "", [Two], ["--config", str(path)])
    text = capsys.readouterr().err
    assert re.search(message, text) and str(path) in text


def test_the_entry_lists_commands_and_refuses_unknown_ones():
    shown = subprocess.run([sys.executable, "-m", "chatglm_ptuning"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("train", "evaluate", "chat"))
    refused = subprocess.run([sys.executable, "-m", "chatglm_ptuning", "trian"], capture_output=True, text=True)
    assert refused.returncode == 2 and "did you mean train?" in refused.stderr
