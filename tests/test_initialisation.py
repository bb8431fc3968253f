import pytest
import torch

from chatglm_ptuning.model.loading import load_model, load_tokenizer
from chatglm_ptuning.training.initialisation import init_prefix


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_from_text_is_that_text_in_front(base, projection):
    tokenizer = load_tokenizer(str(base))
    text = tokenizer.encode("请问今天天气", add_special_tokens=False)
    question = tokenizer.encode("你是谁", add_special_tokens=False)
    plain = load_model(str(base))
    expected = plain(torch.tensor([text + question])).logits[:, len(text) :]
    model = load_model(str(base), pre_seq_len=len(text), prefix_projection=projection)
    init_prefix(model, tokenizer, "text", text="请问今天天气")
    torch.testing.assert_close(model(torch.tensor([question])).logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_fill_the_prefix_whatever_its_length(base):
    tokenizer = load_tokenizer(str(base))
    examples = [{"input_ids": tokenizer.encode(text)} for text in ("今天", "你好吗")]
    for length in (2, 9, 40):
        model = load_model(str(base), pre_seq_len=length)
        init_prefix(model, tokenizer, "data", examples=examples)
        assert not model.transformer.prefix_encoder.is_untrained
    with pytest.raises(ValueError, match="needs training rows"):
        init_prefix(model, tokenizer, "data")


def test_small_values_are_the_official_ones_made_small(base):
    torch.manual_seed(3)
    official = load_model(str(base), pre_seq_len=64)
    assert abs(official.transformer.prefix_encoder.embedding.weight.std().item() - 1) < 0.05
    init_prefix(official, load_tokenizer(str(base)), "small")
    assert abs(official.transformer.prefix_encoder.embedding.weight.std().item() - 0.02) < 0.001
