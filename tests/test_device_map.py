"""A base spread over memory and disk by accelerate, with prefixes."""

import accelerate
import pytest
import torch
from conftest import TINY

from chatglm_ptuning import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm_ptuning.command_line import parse_arguments
from chatglm_ptuning.evaluation.arguments import EvaluationArguments
from chatglm_ptuning.model.loading import load_model
from chatglm_ptuning.model.placement import layer_devices
from chatglm_ptuning.prefix.bank import LoadedPrefix, PrefixBank
from chatglm_ptuning.prefix.batch import assemble
from chatglm_ptuning.prefix.shape import PrefixShape
from chatglm_ptuning.serving.engine.engine import Engine
from chatglm_ptuning.serving.engine.prefixes import RowPrefix
from chatglm_ptuning.serving.engine.request import SamplingSettings
from chatglm_ptuning.serving.engine.slots import SlotCache

ALIKE = {"rtol": 1e-5, "atol": 1e-5}
"""Layers that accelerate moves are computed by torch, others perhaps by oneDNN."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "four-layers"
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | {"num_layers": 4})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prefixes(base, tmp_path_factory):
    folders = {}
    for name, length in (("a", 3), ("b", 5)):
        model = ChatGLMForConditionalGeneration.from_pretrained(base, pre_seq_len=length)
        encoder = model.transformer.prefix_encoder
        encoder.set_key_values(torch.randn(length, *encoder.kv_shape, generator=torch.Generator().manual_seed(length)))
        folders[name] = tmp_path_factory.mktemp("prefixes") / name
        model.save_prefix(folders[name])
    return folders


def spread(base, tmp_path, part):
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    return load_model(
        str(base), device_map="auto", max_memory={"cpu": int(size * part)}, offload_folder=str(tmp_path / "offload")
    )


@pytest.mark.parametrize("part", [0.6, 0.1], ids=["half on disk", "all on disk"])
def test_prefixes_work_on_a_base_that_is_partly_on_the_disk(base, prefixes, tmp_path, ids, part):
    model, whole = spread(base, tmp_path, part), load_model(str(base))
    assert "disk" in model.hf_device_map.values()
    assert model.device == torch.device("cpu")
    for other in (model, whole):
        for name, folder in prefixes.items():
            other.load_prefix(folder, name)
    for selection in ("a", "b", None, ["b", None, "a"]):
        tokens = []
        for other in (model, whole):
            other.set_prefix(selection)
            tokens.append(other.generate(ids.to(other.device), max_new_tokens=8, do_sample=False, eos_token_id=-1))
        assert torch.equal(*tokens), selection
        assert tokens[0].shape[1] > ids.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, **ALIKE)


@pytest.mark.parametrize("part", [0.6, 0.1])
def test_another_base_is_recognised_on_the_disk_too(base, prefixes, tmp_path, part):
    other = tmp_path / "other"
    torch.manual_seed(1)
    ChatGLMForConditionalGeneration(ChatGLMConfig(**TINY | {"num_layers": 4})).save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on another base"):
        spread(other, tmp_path, part).load_prefix(prefixes["a"])


@pytest.mark.parametrize("part", [0.6, 0.1])
def test_a_trainable_prefix_stays_in_memory(base, prefixes, tmp_path, ids, part):
    def load(folder, length=3):
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        memory, offload = {"cpu": int(part * size)}, str(tmp_path / "offload")
        return load_model(str(folder), pre_seq_len=length, device_map="auto", max_memory=memory, offload_folder=offload)

    model, whole = load(base), load_model(str(base))
    with pytest.raises(ValueError, match="is untrained"):
        model.generate(ids)
    model.load_prefix(prefixes["a"])
    whole.load_prefix(prefixes["a"])
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, **ALIKE)
    model(ids, labels=ids).loss.backward()
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0
    # A base that was saved together with its prefix.
    together = load_model(str(base), pre_seq_len=3)
    together.load_prefix(prefixes["a"])
    together.save_pretrained(tmp_path / "together")
    for length in (3, 4):
        model = load(tmp_path / "together", length)
        assert model.transformer.prefix_encoder.is_untrained
        torch.testing.assert_close(model(ids, prefix="together").logits, whole(ids).logits, **ALIKE)


@pytest.mark.parametrize("part", [0.6, 0.1])
def test_a_head_stays_in_memory(base, tmp_path, ids, part):
    """Else it would be the first to be offloaded, and a prefix could not bring its own."""
    settings = {"model_class": ChatGLMForSequenceClassification, "num_labels": 3}
    whole = load_model(str(base), pre_seq_len=2, **settings)
    torch.nn.init.normal_(whole.classifier_head.weight)
    torch.nn.init.normal_(whole.transformer.prefix_encoder.embedding.weight)
    whole.save_prefix(tmp_path / "prefix", head="sequence_classification", labels=["a", "b", "c"])
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    memory, offload = {"cpu": int(part * size)}, str(tmp_path / "offload")
    model = load_model(str(base), device_map="auto", max_memory=memory, offload_folder=offload, **settings)
    with pytest.raises(ValueError, match=r"classifier_head.*untrained"):
        model.check_prefix_is_trained()
    model.load_prefix(tmp_path / "prefix")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, whole.eval()(ids).logits, **ALIKE)
    accelerate.cpu_offload(model.classifier_head, torch.device("cpu"))
    model.load_prefix(tmp_path / "prefix")  # whose head does not go into the model's own
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, **ALIKE)
    accelerate.cpu_offload(whole.classifier_head, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"classifier_head\.weight has been offloaded"):
        whole.load_prefix(tmp_path / "prefix")


def test_nothing_changes_without_a_device_map(base):
    assert layer_devices(load_model(str(base)).transformer.encoder.layers) is None


def test_each_layer_gets_its_part_of_the_prefix_where_it_is():
    # "meta" simulates a second device, which this machine lacks.
    cpu, other = torch.device("cpu"), torch.device("meta")
    bank = PrefixBank()
    values = torch.randn(3, 8, 2, 4)
    bank.add("a", LoadedPrefix(values, {}))
    bank.add("b", LoadedPrefix(values[:2], {}))

    def batch_of(selection, *devices):
        names = [selection] if isinstance(selection, str) else selection
        prefixes = {name: bank.key_values(name, cpu, torch.float32) for name in names}
        return assemble(selection, prefixes, bank.versions, {}).spread(devices)

    for selection, mask in (("a", None), (("b", "a"), True)):
        batch = batch_of(selection, cpu, cpu, other, other)
        layers = [entry for layer in range(4) for entry in batch.layer(layer, 2)]
        assert [entry.device for entry in layers] == [cpu] * 4 + [other] * 4
        assert {tuple(entry.shape) for entry in layers} == {(2, 2, 3, 4)}
        assert (batch.length, batch.mask is not None) == (3, bool(mask))
    assert torch.equal(layers[3][1], values[:, 3].transpose(0, 1))
    # Made once: the same memory serves every batch and all of its rows.
    first, second = (batch_of("a", cpu, cpu, cpu, cpu).layer(2, 5)[0] for _ in range(2))
    assert first.data_ptr() == second.data_ptr() and first.stride(0) == 0


@pytest.mark.parametrize("part", [0.6, 0.1])
def test_the_engine_answers_on_a_base_that_is_partly_on_the_disk(base, prefixes, tmp_path, part):
    prompt, found = [5, 17, 60, 33, 8, 21], []
    for model in (spread(base, tmp_path, part), load_model(str(base))):
        for name, folder in prefixes.items():
            model.load_prefix(folder, name)
        with Engine(model, slots=2, slot_tokens=40) as engine:
            batches = [model.prefix_batch(name) for name in ("a", None, "b", "a")]
            running = [engine.submit(prompt, SamplingSettings(8), RowPrefix.of(batch)) for batch in batches]
            found.append([[token.id for token in generation] for generation in running])
    assert found[0] == found[1]
    assert found[0][0] == found[0][3] and found[0][0] != found[0][1] != found[0][2]


def test_slots_are_where_their_layers_are():
    cpu, other = torch.device("cpu"), torch.device("meta")  # simulates a second device
    cache = SlotCache(PrefixShape(3, 2, 4), 2, 10, cpu, torch.float32, [cpu, other, cpu])
    prefix = torch.randn(6, 2, 3, 4)
    cache.put_prefix(1, prefix)
    cache.swap(0, 1, 3)
    cache.select(torch.tensor([[3, 4]]), 5)
    for layer, device in enumerate((cpu, other, cpu)):
        new = torch.randn(2, 1, 2, 2, 4, device=device)
        keys, values = cache.update(*new, layer)
        assert keys.device == values.device == device and keys.shape == (1, 2, 5, 4)
        if device == cpu:
            for found, place, own in ((keys, 0, new[0]), (values, 1, new[1])):
                assert torch.equal(found[0], torch.cat((prefix[2 * layer + place], own[0]), dim=1))


def test_the_flag_takes_auto_alone(capsys):
    with pytest.raises(SystemExit):
        parse_arguments("evaluate", "", (EvaluationArguments,), ["--device_map", "cuda:0"])
    assert "--device_map must be one of auto, got 'cuda:0'" in capsys.readouterr().err
