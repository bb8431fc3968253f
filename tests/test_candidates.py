"""Candidates scored together have the log-likelihoods that each has alone."""

import pytest
import tiny_base
import torch

from chatglm_ptuning import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_ptuning.chat.message import Message
from chatglm_ptuning.evaluation.candidates import score_candidates

END = 2
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 11, 12], [20], [30, 31, 32, 33, 34]]
# Several tokens, single ones, and some that begin others: with the end token they are different paths.
CANDIDATES = [
    [40, END],
    [40, 41, END],
    [40, 41, 42, END],
    [50, END],
    [51],
    [51, 52, 53, 54, 55, END],
    [40, 41, 43, END],
]


def one_by_one(model, prompt, candidate):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *candidate]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(candidate)), candidate].sum().item()


def assert_equals_naive(model, scores, prompts, candidates, prefixes=None):
    for index, (prompt, row) in enumerate(zip(prompts, scores, strict=True)):
        if prefixes is not None:
            model.set_prefix(prefixes[index])
        own = candidates if isinstance(candidates[0][0], int) else candidates[index]
        expected = torch.tensor([one_by_one(model, prompt, candidate) for candidate in own])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_size", [1, 3, 512])
def test_equals_one_by_one_in_padded_batches(load, attention, chunk_size):
    model = load(attn_implementation=attention).eval()
    scores = score_candidates(model, PROMPTS, CANDIDATES, batch_size=3, chunk_size=chunk_size)
    assert_equals_naive(model, scores, PROMPTS, CANDIDATES)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_one_by_one_under_a_prefix(load, prefix_folders, attention):
    model = load(attn_implementation=attention).eval()
    model.load_prefix(prefix_folders["b"], name="b")
    with_prefix = score_candidates(model, PROMPTS, CANDIDATES)
    assert_equals_naive(model, with_prefix, PROMPTS, CANDIDATES)
    model.set_prefix(None)
    assert not torch.allclose(with_prefix[0], score_candidates(model, PROMPTS, CANDIDATES)[0], atol=0.1)


def test_equals_one_by_one_with_a_prefix_per_row(load, prefix_folders):
    model = load().eval()
    for name in ("a", "b"):
        model.load_prefix(prefix_folders[name], name=name)
    prefixes = ["a", None, "b", "a"]
    model.set_prefix(prefixes)
    scores = score_candidates(model, PROMPTS, CANDIDATES, batch_size=3, chunk_size=4)
    assert model.selected_prefix == tuple(prefixes)
    model.set_prefix("b")
    for prefix in (prefixes, model.prefix_batch(prefixes)):
        passed = score_candidates(model, PROMPTS, CANDIDATES, batch_size=3, chunk_size=4, prefix=prefix)
        assert all(map(torch.equal, passed, scores)) and model.selected_prefix == "b"
    with pytest.raises(ValueError, match=r"each of 3 rows, .* 4\."):
        score_candidates(model, PROMPTS, CANDIDATES, prefix=["a", None, "b"])
    assert_equals_naive(model, scores, PROMPTS, CANDIDATES, prefixes)


def test_each_prompt_can_have_its_own_candidates(load):
    model = load().eval()
    own = [CANDIDATES[:2], [[60, END]], CANDIDATES, [[61], [62]]]
    scores = score_candidates(model, PROMPTS, own, chunk_size=2)
    assert [len(row) for row in scores] == [2, 1, 7, 2]
    assert_equals_naive(model, scores, PROMPTS, own)


def test_a_large_label_set_is_exact_and_sums_to_less_than_one(load):
    model = load().eval()
    generator = torch.Generator().manual_seed(0)
    labels = [[*torch.randint(3, 96, (1 + i % 5,), generator=generator).tolist(), END] for i in range(119)]
    labels = [list(label) for label in dict.fromkeys(map(tuple, labels))]
    scores = score_candidates(model, PROMPTS[:2], labels, chunk_size=50)
    assert_equals_naive(model, scores, PROMPTS[:2], labels)
    assert scores[0].exp().sum() < 1  # with end tokens they exclude each other


def test_scoring_does_not_change_the_model(trained):
    model = trained().train()
    score_candidates(model, PROMPTS, CANDIDATES)
    assert model.training and model.transformer.training and model.selected_prefix == "default"


def test_scores_agree_with_what_a_trained_base_answers(tmp_path):
    folder = tiny_base.make_base(tmp_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    answers = list(dict.fromkeys(tiny_base.ANSWERS.values()))
    prompts = [tokenizer.build_chat_input(prompt, [])["input_ids"][0].tolist() for prompt in tiny_base.ANSWERS]
    candidates = [tokenizer.chat.encode_answer(Message("assistant", answer)) for answer in answers]
    assert all(candidate[-1] == tokenizer.eos_token_id for candidate in candidates)
    scores = score_candidates(model, prompts, candidates)
    assert [answers[row.argmax()] for row in scores] == list(tiny_base.ANSWERS.values())
    assert scores[0].softmax(-1).max() > 0.9


@pytest.mark.parametrize(
    ("prompts", "candidates", "options", "message"),
    [
        ([[]], CANDIDATES, {}, "Prompt 0 .* has no tokens"),
        ([[5]], [[[4], []]], {}, "Candidate 1 of prompt 0"),
        ([[5]], [[[4]], [[4]]], {}, "2 prompts.* 1 prompts"),
        ([[5]], CANDIDATES, {"chunk_size": 0}, "chunk_size .*at least 1.* 0"),
        ([[5]], [[]], {}, "no candidates .*prompt 0"),
    ],
)
def test_refuses_invalid_prompts_and_candidates(load, prompts, candidates, options, message):
    with pytest.raises(ValueError, match=message):
        score_candidates(load(), prompts, candidates, **options)


def test_refuses_an_untrained_prefix(load):
    with pytest.raises(ValueError, match="untrained"):
        score_candidates(load(pre_seq_len=4), PROMPTS, CANDIDATES)
