"""The bundled base, as a user gets it."""

import json
from pathlib import Path

import pytest
import torch

import chatglm_ptuning
from chatglm_ptuning.model.arguments import DEFAULT_MODEL
from chatglm_ptuning.model.native_glm import as_glm

HEADLINES = Path(DEFAULT_MODEL).parent / "news_topic" / "train.json"

pytestmark = pytest.mark.skipif(not Path(DEFAULT_MODEL).exists(), reason="data/chatglm-nano is not in this checkout")


@pytest.fixture(scope="module")
def nano():
    model = chatglm_ptuning.ChatGLMForConditionalGeneration.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    return model, chatglm_ptuning.ChatGLMTokenizer.from_pretrained(DEFAULT_MODEL)


def test_it_is_a_chatglm3_in_small(nano):
    model, tokenizer = nano
    config = model.config
    assert config.multi_query_attention and config.multi_query_group_num == 2 and config.num_layers > 1
    assert tokenizer.chat_format == "chatglm3"
    assert config.padded_vocab_size >= len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("[gMASK]") == tokenizer.vocabulary.pieces + 1
    files = [path for path in Path(DEFAULT_MODEL).iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "README.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) < 25 * 2**20


def test_it_has_learned_chinese(nano):
    model, tokenizer = nano
    text = "酒店的房间很干净，服务员的态度也很好，下次还会再来。"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids.clone()
    shuffled[0, 2:] = ids[0, 2:][torch.randperm(ids.shape[1] - 2, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, without_order = (model(input_ids=row, labels=row).loss.item() for row in (ids, shuffled))
    uniform = torch.tensor(float(model.config.padded_vocab_size)).log().item()
    assert loss < 0.65 * uniform and loss < without_order - 1


def test_transformers_own_network_gives_the_same_logits(nano):
    model, tokenizer = nano
    ids = tokenizer("酒店的房间很干净，服务员的态度也很好，下次还会再来。" * 20, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = (network(ids).logits for network in (model.eval(), as_glm(model)))
    assert ids.shape[1] > 256 and torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


def test_it_stops_where_its_turn_ends(nano):
    model, tokenizer = nano
    assert set(model.generation_config.eos_token_id) == {
        2, *tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    }  # fmt: skip


def test_text_far_back_in_the_context_is_used(nano):
    model, tokenizer = nano
    text = "".join(row["text"] for row in map(json.loads, HEADLINES.read_text("utf-8").splitlines()[:30]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:400]
    row = torch.tensor([[*tokenizer("")["input_ids"], *ids, *ids]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="none")
    first, second = losses[1:401].mean(), losses[401:].mean()
    assert second < first - 1  # 0.4 where rows of 256 were all that it had seen


def test_auto_classes_and_pipelines_take_it():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    assert isinstance(AutoConfig.from_pretrained(DEFAULT_MODEL), chatglm_ptuning.ChatGLMConfig)
    assert isinstance(AutoTokenizer.from_pretrained(DEFAULT_MODEL), chatglm_ptuning.ChatGLMTokenizer)
    assert hasattr(AutoModel.from_pretrained(DEFAULT_MODEL), "chat")
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    generate = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(DEFAULT_MODEL))
    messages = [{"role": "user", "content": "这家酒店怎么样"}]
    (reply,) = generate(messages, max_new_tokens=5, do_sample=False)
    assert reply["generated_text"][-1]["role"] == "assistant"
