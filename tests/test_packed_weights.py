"""Official 4- and 8-bit checkpoints, made here by independent arithmetic."""

import json
import subprocess
import sys

import numpy
import packed_base
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm_ptuning.model.packed_weights import unpack


def weights_of(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(("bits", "suffix"), [(4, "bin"), (8, "bin"), (4, "safetensors"), (8, "safetensors")])
def test_a_packed_base_loads_with_exactly_its_weights(tiny_base, tmp_path, bits, suffix):
    expected = packed_base.make_packed_base(tiny_base, tmp_path / "packed", bits, shards=3, suffix=suffix)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert numpy.array_equal(found[name].numpy(), weight), name


def test_the_published_byte_order_and_signs():
    # 0x7F: 7 in the high half and -1 in the low one; 0x80: -8 and 0. Scales 0.5 and 2.
    packed = numpy.array([[0x7F, 0x80], [0x12, 0xEF]], dtype=numpy.uint8).view(numpy.int8)
    scale = numpy.array([0.5, 2.0], dtype=numpy.float16)
    by_hand = [[3.5, -0.5, -4.0, 0.0], [2.0, 4.0, -4.0, -2.0]]
    assert packed_base.unpack_rows(packed, scale, 4).tolist() == by_hand
    assert unpack(torch.from_numpy(packed), torch.from_numpy(scale).float(), 4, bits=4).tolist() == by_hand


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(tiny_base, tmp_path, dtype):
    expected = packed_base.make_packed_base(tiny_base, tmp_path / "packed", 4)
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=dtype, pre_seq_len=3)
    for name, weight in weights_of(model).items():
        if "prefix_encoder" in name:
            assert weight.dtype == torch.float32
        else:
            assert torch.equal(weight, torch.from_numpy(expected[name]).to(dtype)), name


def test_it_is_an_ordinary_base_afterwards(tiny_base, tmp_path, ids):
    packed_base.make_packed_base(tiny_base, tmp_path / "packed", 4)
    model = AutoModel.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert (model.config.quantization_bit, model.config.dequantized_from_bit) == (0, 4)
    model.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "plain" / "model.safetensors")
    assert saved.keys() == weights_of(model).keys()
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.dequantized_from_bit == 4
    head = ChatGLMForSequenceClassification.from_pretrained(tmp_path / "packed", pre_seq_len=2, num_labels=3)
    assert torch.equal(
        head.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight,
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_base_can_be_quantised_again_by_bitsandbytes(tiny_base, tmp_path, ids, bits):
    pytest.importorskip("bitsandbytes")
    packed_base.make_packed_base(tiny_base, tmp_path / "packed", 8)
    settings = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
                8: {"load_in_8bit": True}}[bits]  # fmt: skip
    model = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    )
    unpacked = ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    unpacked.save_pretrained(tmp_path / "plain")
    same = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, quantization_config=BitsAndBytesConfig(**settings)
    )
    weight = model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight
    assert weight.dtype == {4: torch.uint8, 8: torch.int8}[bits]
    assert torch.equal(model.eval()(ids).logits, same.eval()(ids).logits)


def rewrite(folder, **fields):
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | fields), "utf-8")


def test_what_does_not_fit_is_named(tiny_base, tmp_path):
    packed_base.make_packed_base(tiny_base, tmp_path / "packed", 4, shards=1)
    rewrite(tmp_path / "packed", quantization_bit=8)
    with pytest.raises(ValueError, match=r"quantization_bit=8 .*weights transformer.*8 bits .*\d+ inp"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed")
    rewrite(tmp_path / "packed", quantization_bit=3)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed")
    rewrite(tmp_path / "packed", quantization_bit=4)
    (file,) = (tmp_path / "packed").glob("*.bin")
    tensors = torch.load(file, weights_only=True)
    name = next(name for name in tensors if name.endswith("weight_scale"))
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"has no weight_scale.*set quantization_bit to 0"):
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "packed")


def test_an_ordinary_base_is_not_taken_for_a_packed_one(tiny_base):
    with pytest.raises(ValueError, match=r"quantization_bit=4 .*has no weight_scale"):
        ChatGLMForConditionalGeneration.from_pretrained(tiny_base, quantization_bit=4)


_LOAD = """
import resource, sys, torch
from chatglm_ptuning import ChatGLMForConditionalGeneration
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = ChatGLMForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
def test_there_are_never_two_copies_of_all_the_weights(tmp_path):
    wide = {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 4096, "kv_channels": 128, "num_attention_heads": 8}
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | wide)).save_pretrained(tmp_path / "base")
    packed_base.make_packed_base(tmp_path / "base", tmp_path / "packed", 8, shards=4)
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "packed")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # 1 for the weights and 0.25 for the file, of which a layer at a time is in memory twice.
    assert float(done.stdout.split()[-1]) < 1.45
