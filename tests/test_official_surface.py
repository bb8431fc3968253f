"""The Python interface of the official modeling_chatglm.py and tokenization_chatglm.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import sentencepiece
import tiktoken
import tiny_chat_base
import tiny_glm4
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM

from chatglm_ptuning import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.model.official_model import RETIRED_ARGUMENTS, OfficialModelSurface, Retired
from chatglm_ptuning.model.official_tokenizer import RETIRED_ATTRIBUTES

RETIRED_METHODS = sorted(name for name, value in vars(OfficialModelSurface).items() if isinstance(value, Retired))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_base.write_base(tmp_path_factory.mktemp("surface") / "chatglm3-6b")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    return ChatGLMTokenizer.from_pretrained(tiny_glm4.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "glm-4"))


# Loading


@pytest.mark.parametrize("arguments", [{"device": "cpu"}, {"device": torch.device("cpu")}, {"empty_init": False},
                                       {"empty_init": True, "use_cache": False}])  # fmt: skip
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSeq2SeqLM, ChatGLMForConditionalGeneration])
def test_arguments_of_the_official_constructors(folder, model, auto_class, arguments):
    loaded = auto_class.from_pretrained(folder, trust_remote_code=True, **arguments)
    assert type(loaded) is ChatGLMForConditionalGeneration
    assert loaded.device == torch.device("cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


def test_the_device_is_where_the_weights_are_loaded(folder):
    assert ChatGLMForConditionalGeneration.from_pretrained(folder, device="meta").device.type == "meta"
    with pytest.raises(ValueError, match=r"device='cpu' .*device_map='auto'"):
        ChatGLMForConditionalGeneration.from_pretrained(folder, device="cpu", device_map="auto")


def test_idioms_of_dtypes(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, pre_seq_len=4).half()
    model.transformer.prefix_encoder.float()
    assert model(torch.tensor([[5, 6]])).logits.dtype == torch.float16
    assert model.transformer.prefix_encoder.embedding.weight.dtype == torch.float32
    assert model.float().eval().dtype == torch.float32
    assert model.transformer.pre_seq_len == 4


# Methods of the model


def test_stream_generate_yields_what_generate_returns(model, tokenizer):
    inputs = tokenizer.build_chat_input("你好").to(model.device)
    steps = list(model.stream_generate(**inputs, max_new_tokens=5, do_sample=False))
    whole = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert [step.shape[1] for step in steps] == list(range(inputs["input_ids"].shape[1] + 1, whole.shape[1] + 1))
    assert torch.equal(steps[-1], whole)
    for step in steps:
        assert torch.equal(step, whole[:, : step.shape[1]])
    torch.manual_seed(1)
    sampled = list(model.stream_generate(**inputs, max_new_tokens=5, do_sample=True, top_p=0.8))[-1]
    torch.manual_seed(1)
    assert torch.equal(sampled, model.generate(**inputs, max_new_tokens=5, do_sample=True, top_p=0.8))


def test_stream_generate_ends_at_stop_ids_and_returns_its_cache(model, tokenizer):
    inputs = tokenizer.build_chat_input("你好")
    whole = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()
    length = inputs["input_ids"].shape[1]
    stop = whole[length + 1]
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [stop], "return_past_key_values": True}
    *_, (ids, cache) = model.stream_generate(**inputs, **arguments)
    assert ids[0].tolist() == whole[: whole.index(stop, length) + 1]
    assert cache.get_seq_length() == ids.shape[1] - 1
    again = list(model.stream_generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False))
    assert torch.equal(again[-1], model.generate(ids, max_new_tokens=2, do_sample=False))


def test_a_tokenizers_result_in_place_of_ids_is_refused_with_the_way_out(model, tokenizer):
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], return_tensors="pt")
    for call in (lambda: model.generate(inputs), lambda: model.generate(input_ids=inputs, max_new_tokens=2)):
        with pytest.raises(TypeError, match=r"generate\(\*\*result\).*return_dict=False"):
            call()


def test_stream_generate_takes_one_row(model):
    with pytest.raises(ValueError, match=r"one row, got 2: use generate"):
        next(model.stream_generate(torch.ones(2, 3, dtype=torch.long)))


@pytest.mark.parametrize("chat_format", ["chatglm2", "chatglm3"])
def test_build_inputs_are_those_of_chat(model, folder, chat_format):
    tokenizer = ChatGLMTokenizer.from_pretrained(folder, chat_format=chat_format)
    history = [("你好吗", "好")]
    inputs = model.build_inputs(tokenizer, "你是谁", history)
    assert inputs["input_ids"].device == model.device
    if chat_format == "chatglm2":
        expected = tokenizer(tokenizer.build_prompt("你是谁", history))["input_ids"]
    else:
        messages = [{"role": "user", "content": "你好吗"}, {"role": "assistant", "content": "好"}]
        expected = tokenizer.build_chat_input("你是谁", messages)["input_ids"][0].tolist()
    assert inputs["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("name", RETIRED_METHODS)
def test_retired_methods_name_what_replaces_them(model, name):
    for owner in (model, model.transformer):
        with pytest.raises(NotImplementedError, match=rf"^{name} of the official code is not in this kit: .+\.$"):
            getattr(owner, name)(4)


def test_the_retired_methods_are_known():
    assert RETIRED_METHODS == [
        "build_stream_inputs", "get_masks", "get_position_ids", "get_prompt", "process_response", "quantize",
    ]  # fmt: skip


@pytest.mark.parametrize("name", RETIRED_ARGUMENTS)
def test_retired_arguments_name_what_replaces_them(model, folder, name):
    def call(value):
        if name.startswith("load_in"):
            return AutoModel.from_pretrained(folder, trust_remote_code=True, **{name: value})
        return model(torch.tensor([[5, 6]]), **{name: value})

    with pytest.raises(TypeError, match=rf"argument {name} of the official code is not in this kit: .+\.$"):
        call(True if name != "full_attention_mask" else torch.zeros(1, 1, 2, 2, dtype=torch.bool))


# The tokenizer


def test_commands_and_prefix_tokens(tokenizer, glm4):
    assert tokenizer.special_tokens["<eos>"] == tokenizer.get_command("<eos>") == tokenizer.eos_token_id
    assert tokenizer.get_prefix_tokens() == [tokenizer.get_command("[gMASK]"), tokenizer.get_command("sop")]
    assert glm4.special_tokens["<|user|>"] == glm4.get_command("<|user|>") == len(tiny_glm4.ranks()) + 7
    assert glm4.get_prefix_tokens() == [glm4.get_command("[gMASK]"), glm4.get_command("<sop>")]
    assert tokenizer.vocab_file.endswith("tokenizer.model")


def test_the_inner_tokenizer_of_chatglm3(tokenizer):
    """Official file: SPTokenizer in tokenization_chatglm.py of ChatGLM3-6B."""
    processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    inner, size = tokenizer.tokenizer, processor.vocab_size()
    assert inner.encode("你好") == processor.encode("你好")
    assert inner.encode("你好", bos=True, eos=True) == [1, *processor.encode("你好"), 2]
    assert inner.tokenize("你好") == processor.encode("你好", out_type=str)
    assert (inner.bos_id, inner.eos_id, inner.pad_id, inner.n_words) == (1, 2, 0, size + 9)
    assert inner.special_tokens["<|user|>"] == size + 6 and inner.index_special_tokens[size + 6] == "<|user|>"
    assert inner.decode([size + 6, *processor.encode("你好")]) == "<|user|>你好"
    assert inner.convert_id_to_token(inner.convert_token_to_id("<|user|>")) == "<|user|>"
    assert inner.decode_tokens(inner.tokenize("你好")) == "你好"
    assert inner.sp_model.encode("你好") == processor.encode("你好")


def test_the_inner_tokenizer_of_glm4(glm4):
    """Official file: tokenization_chatglm.py of GLM-4-9B-Chat, where it is tiktoken's, with the special tokens."""
    reference = tiktoken.Encoding(
        "reference", pat_str=tiny_glm4.PATTERN, mergeable_ranks=tiny_glm4.ranks(), special_tokens=glm4.special_tokens
    )
    text = "<|user|>\n你好 a"
    for arguments in ({"disallowed_special": ()}, {"allowed_special": "all"}):
        assert glm4.tokenizer.encode(text, **arguments) == reference.encode(text, **arguments)
    ids = glm4.build_chat_input("你好")["input_ids"][0].tolist()
    assert glm4.tokenizer.decode(ids) == reference.decode(ids) == "[gMASK]<sop><|user|>\n你好<|assistant|>"


def test_a_single_message_as_text(glm4):
    assert glm4.build_single_message("user", "", "你好", tokenize=False) == "<|user|>\n你好"


@pytest.mark.parametrize("name", RETIRED_ATTRIBUTES)
def test_retired_attributes_name_what_replaces_them(tokenizer, glm4, name):
    for owner in (tokenizer, glm4):
        with pytest.raises(AttributeError, match=rf"^{name} of the official code is not in this kit: .+\.$"):
            getattr(owner, name)
        assert not hasattr(owner, name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tokenizer.nonsense


def test_tokenizers_are_copied_and_pickled(tokenizer, glm4):
    for one in (tokenizer, glm4):
        for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert other("你好")["input_ids"] == one("你好")["input_ids"]
