"""Sequences packed in one row: the same losses, gradients and outputs as in padded rows."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.model import modeling_chatglm, packed_sequences
from chatglm_ptuning.model.losses import IGNORED_LABEL, cross_entropy, loss_of_states
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.modeling_heads import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)

ALIKE = {"rtol": 1e-5, "atol": 2e-6}


def random_rows(seed: int, count: int, vocabulary: int = 60, longest: int = 40) -> list[dict[str, list[int]]]:
    """Rows of 2 to `longest` tokens, with labels on the last part of each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        masked = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED_LABEL] * masked + ids[masked:]})
    return rows


def packed(rows: list[dict]) -> dict:
    """The rows as one packed row."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in row["labels"]]]),
        "sequence_lengths": [len(row["input_ids"]) for row in rows],
    }


def loss_and_gradient(model, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def trains(load):
    """The tiny base with a prefix to train, without dropout."""

    def make(**arguments):
        model = load(**{"pre_seq_len": 5, "prefix_dropout": 0.0, **arguments})
        model.init_prefix_from_ids(torch.arange(7, 7 + model.config.pre_seq_len))
        return model.train()

    return make


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients_are_those_of_padded_rows(trains, implementation, side, seed):
    model, rows = trains(), random_rows(seed, count=seed + 2)
    expected = loss_and_gradient(model, PaddingCollator(0, side)(rows))
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(loss_and_gradient(model, packed(rows)), expected, **ALIKE)
    torch.testing.assert_close(loss_and_gradient(model, packed(rows) | {"skip_logits": True}), expected, **ALIKE)


@pytest.mark.parametrize("threads", [1, 4])
def test_long_and_equal_sequences_on_a_cpu(trains, monkeypatch, threads):
    """Queries in several blocks, sequences that are computed together, and heads that are folded or not."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, rows = trains(), random_rows(9, 2, longest=300)
    rows += [{"input_ids": row["input_ids"][::-1], "labels": row["labels"]} for row in rows]
    rows.sort(key=lambda row: len(row["input_ids"]))
    assert len(rows[-1]["input_ids"]) > 256
    expected = loss_and_gradient(model, PaddingCollator(0, "right")(rows))
    torch.testing.assert_close(loss_and_gradient(model, packed(rows)), expected, **ALIKE)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kernel", [False, True])
def test_tokens_that_fill_up_a_pass_change_nothing(trains, monkeypatch, implementation, kernel):
    model, rows = trains(attn_implementation=implementation), random_rows(4, 5)
    batch = packed(rows) | {"skip_logits": True}
    assert sum(batch["sequence_lengths"]) % 16
    expected = loss_and_gradient(model, batch)
    monkeypatch.setattr(modeling_chatglm, "rounded_up", lambda rows: rows + 37)
    monkeypatch.setattr(packed_sequences, "_has_varlen_kernel", lambda states: kernel)
    monkeypatch.setattr(packed_sequences, "varlen_attn", varlen_by_its_documentation)
    torch.testing.assert_close(loss_and_gradient(model, batch), expected, **ALIKE)


def varlen_by_its_documentation(query, key, value, starts, key_starts, longest, longest_key, **settings):
    """torch's kernel for sequences of different lengths, which needs a GPU, as it is documented."""
    assert settings["window_size"] == (-1, 0) and settings["enable_gqa"]
    assert starts.dtype == key_starts.dtype == torch.int32
    outputs = []
    for (start, end), (first, last) in zip(itertools.pairwise(starts), itertools.pairwise(key_starts), strict=True):
        tokens, keys = int(end - start), int(last - first)
        assert tokens <= longest and keys <= longest_key
        seen = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens)  # aligned to the last key
        own = (states.transpose(0, 1)[None] for states in (query[start:end], key[first:last], value[first:last]))
        output = functional.scaled_dot_product_attention(*own, attn_mask=seen, scale=settings["scale"], enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def test_the_kernel_of_gpus_gets_what_it_needs(trains, monkeypatch):
    model, rows = trains(), random_rows(5, 6)
    expected = loss_and_gradient(model, PaddingCollator(0, "right")(rows))
    monkeypatch.setattr(packed_sequences, "_has_varlen_kernel", lambda states: True)
    monkeypatch.setattr(packed_sequences, "varlen_attn", varlen_by_its_documentation)
    torch.testing.assert_close(loss_and_gradient(model, packed(rows) | {"skip_logits": True}), expected, **ALIKE)


@pytest.mark.parametrize(
    "settings", [{"prefix_projection": True}, {"multi_query_attention": False}, {"pre_seq_len": 64}]
)
def test_every_kind_of_prefix_is_packed(trains, tiny_config, settings):
    if "multi_query_attention" in settings:
        config = tiny_config(multi_query_attention=False, multi_query_group_num=4, pre_seq_len=5, prefix_dropout=0.0)
        model = ChatGLMForConditionalGeneration(config).train()
    else:
        model = trains(**settings)
    rows = random_rows(7, 5)
    expected = loss_and_gradient(model, PaddingCollator(0, "right")(rows))
    torch.testing.assert_close(loss_and_gradient(model, packed(rows) | {"skip_logits": True}), expected, **ALIKE)


def test_prefix_dropout_is_drawn_for_each_sequence(trains):
    model, rows = trains(prefix_dropout=0.5), random_rows(3, 4)
    torch.manual_seed(11)
    expected = loss_and_gradient(model, PaddingCollator(0, "right")(rows))
    torch.manual_seed(11)
    torch.testing.assert_close(loss_and_gradient(model, packed(rows)), expected, **ALIKE)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(trains, reentrant):
    model, rows = trains(prefix_dropout=0.3), random_rows(3, 4)
    batch = packed(rows) | {"skip_logits": True}
    torch.manual_seed(11)
    expected = loss_and_gradient(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(11)
    torch.testing.assert_close(loss_and_gradient(model, batch), expected, **ALIKE)


def test_every_sequence_has_the_prefix_of_its_own_name(load, prefix_folders):
    model, rows = load().eval(), random_rows(5, 4)
    for name, folder in prefix_folders.items():
        model.load_prefix(folder, name=name)
    names = [None, *prefix_folders]
    names = [names[place % len(names)] for place in range(len(rows))]
    together = model(**packed(rows), prefix=names).logits[0].split([len(row["input_ids"]) for row in rows])
    for row, name, logits in zip(rows, names, together, strict=True):
        alone = model(torch.tensor([row["input_ids"]]), prefix=[name]).logits[0]
        torch.testing.assert_close(logits, alone, **ALIKE)


def test_given_supervised_positions_are_those_that_are_found(trains):
    model, rows = trains(), random_rows(6, 3)
    batch = packed(rows) | {"skip_logits": True}
    places = (batch["labels"][0] != IGNORED_LABEL).nonzero().flatten()
    expected = loss_and_gradient(model, batch)
    torch.testing.assert_close(
        loss_and_gradient(model, batch | {"supervised_positions": places}), expected, rtol=0, atol=0
    )


def test_the_first_token_of_a_sequence_is_not_predicted(trains):
    model, rows = trains(), random_rows(6, 3)
    expected = model(**packed(rows)).loss
    for row in rows:
        row["labels"][0] = row["input_ids"][0]
    torch.testing.assert_close(model(**packed(rows)).loss, expected)
    torch.testing.assert_close(model(**packed(rows), skip_logits=True).loss, expected, **ALIKE)


def test_a_row_without_labels_has_a_loss_of_zero(trains):
    model, rows = trains(), [{"input_ids": [1, 2], "labels": [IGNORED_LABEL] * 2}]
    assert model(**packed(rows), skip_logits=True).loss.item() == 0


HEADS = {
    ChatGLMForSequenceClassification: lambda rows: {"labels": torch.arange(len(rows)) % 2},
    ChatGLMForTokenClassification: lambda rows: {"labels": [[label % 2 for label in row["input_ids"]] for row in rows]},
    ChatGLMForQuestionAnswering: lambda rows: {
        "start_positions": torch.tensor([len(row["input_ids"]) // 2 for row in rows]),
        "end_positions": torch.tensor([len(row["input_ids"]) - 1 for row in rows]),
    },
}


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
@pytest.mark.parametrize("side", ["left", "right"])
def test_heads_have_the_losses_of_padded_rows(tiny_base, head, side):
    torch.manual_seed(5)
    model = head.from_pretrained(tiny_base, pre_seq_len=5, prefix_dropout=0.0).train()
    rows = random_rows(8, 5)
    gold = HEADS[head](rows)
    if isinstance(gold.get("labels"), list):
        rows = [row | {"labels": labels} for row, labels in zip(rows, gold.pop("labels"), strict=True)]
        padded, flat = PaddingCollator(0, side)(rows), packed(rows)
    else:
        padded = {key: value for key, value in PaddingCollator(0, side)(rows).items() if key != "labels"} | gold
        flat = {key: value for key, value in packed(rows).items() if key != "labels"} | gold
        if side == "left" and "start_positions" in gold:
            shifts = torch.tensor([padded["input_ids"].shape[1] - len(row["input_ids"]) for row in rows])
            padded |= {name: gold[name] + shifts for name in gold}
    torch.testing.assert_close(loss_and_gradient(model, flat), loss_and_gradient(model, padded), **ALIKE)


@pytest.mark.parametrize("lengths", [[3, 3], [3, 4, 0], [8]])
def test_lengths_that_do_not_add_up_are_refused(trains, lengths):
    with pytest.raises(ValueError, match=r"sequence_lengths .*7 tokens"):
        trains()(torch.arange(1, 8)[None], sequence_lengths=lengths)


def test_packed_rows_take_no_mask(trains):
    with pytest.raises(ValueError, match="attention_mask"):
        trains()(torch.arange(1, 8)[None], attention_mask=torch.ones(1, 7), sequence_lengths=[3, 4])


def test_several_rows_cannot_be_packed_rows(trains):
    with pytest.raises(ValueError, match=r"sequence_lengths .*2 rows"):
        trains()(torch.ones(2, 4, dtype=torch.long), sequence_lengths=[4, 4])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_frozen_output_layer_is_that_of_its_logits(dtype, smoothing):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 500, bias=False, dtype=dtype).requires_grad_(False)
    labels = torch.randint(500, (1100,))
    states = torch.randn(1100, 16, dtype=dtype, requires_grad=True)
    expected = cross_entropy(functional.linear(states, layer.weight), labels, smoothing=smoothing)
    found = loss_of_states(states, layer, labels, smoothing=smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    wanted, got = (torch.autograd.grad(loss, states)[0] for loss in (expected, found))
    torch.testing.assert_close(got, wanted, **(ALIKE if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-6}))


def test_an_output_layer_that_is_trained_gets_its_gradient():
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 50, bias=False)
    states, labels = torch.randn(20, 16), torch.randint(50, (20,))
    expected = torch.autograd.grad(cross_entropy(layer(states), labels), layer.weight)
    torch.testing.assert_close(torch.autograd.grad(loss_of_states(states, layer, labels), layer.weight), expected)
