"""Both chat formats token by token: against ids written by hand, and against the official recipes."""

from __future__ import annotations

import pytest
from tiny_tokenizer import spell, spell_marked, train

from chatglm_ptuning.chat.message import Conversation, Message


def user(content: str) -> Message:
    return Message("user", content)


def answer(content: str, metadata: str = "", loss: bool = True) -> Message:
    return Message("assistant", content, metadata, loss)


def marked(messages: list[Message], tokenizer, source_prefix: str = "") -> str:
    encoded = tokenizer.chat.encode(Conversation(messages, source_prefix))
    return spell_marked(tokenizer, encoded.input_ids, encoded.loss_mask)


def prompt(messages: list[Message], tokenizer, source_prefix: str = "") -> str:
    return spell(tokenizer, tokenizer.chat.encode_prompt(Conversation(messages, source_prefix).asked))


# ChatGLM3


def test_chatglm3_single_turn(chatglm3):
    expected = "[gMASK]sop<|user|>▁\n▁你好<|assistant|>【▁\n▁谁</s>】"
    assert marked([user("你好"), answer("谁")], chatglm3) == expected


def test_chatglm3_learns_the_role_token_that_ends_an_answer(chatglm3):
    messages = [Message("system", "公园"), user("甲"), answer("乙"), user("丙"), answer("丁")]
    assert marked(messages, chatglm3) == (
        "[gMASK]sop<|system|>▁\n▁公园<|user|>▁\n▁甲<|assistant|>【▁\n▁乙<|user|>】▁\n▁丙<|assistant|>【▁\n▁丁</s>】"
    )


def test_chatglm3_leaves_out_answers_by_turn(chatglm3):
    messages = [user("甲"), answer("乙", loss=False), user("丙"), answer("丁"), user("戊"), answer("己", loss=False)]
    assert marked(messages, chatglm3) == (
        "[gMASK]sop<|user|>▁\n▁甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙<|assistant|>【▁\n▁丁<|user|>】"
        "▁\n▁戊<|assistant|>▁\n▁己</s>"
    )


def test_chatglm3_tool_calls_learn_the_call_and_not_its_result(chatglm3):
    messages = [user("甲"), answer("想"), answer("f()", "get"), Message("observation", "雨"), answer("有雨")]
    assert marked(messages, chatglm3) == (
        "[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁想<|assistant|>▁get\n▁f()<|observation|>】▁\n▁雨"
        "<|assistant|>【▁\n▁有雨</s>】"
    )


def test_chatglm3_an_answer_ends_as_in_the_whole_conversation_when_the_rest_is_not_learned(chatglm3):
    messages = [user("甲"), answer("想"), answer("f()", "get", loss=False), Message("observation", "雨")]
    for end, role in ((4, "assistant"), (3, "assistant")):
        (part,) = chatglm3.chat.training_parts(Conversation(messages[:end]))
        found = chatglm3.chat.encode(part)
        assert spell_marked(chatglm3, found.input_ids, found.loss_mask) == (
            f"[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁想<|{role}|>】"
        )


def test_chatglm3_does_not_learn_to_open_a_system_message(chatglm3):
    messages = [user("甲"), answer("乙"), Message("system", "公园"), user("丙"), answer("丁")]
    assert "【▁\n▁乙】<|system|>" in marked(messages, chatglm3)


def test_chatglm3_without_a_last_answer_has_no_end_token(chatglm3):
    expected = "[gMASK]sop<|user|>▁\n▁甲<|assistant|>【▁\n▁乙<|user|>】▁\n▁丙"
    assert marked([user("甲"), answer("乙"), user("丙")], chatglm3) == expected


def test_chatglm3_generation_prompt(chatglm3):
    expected = "[gMASK]sop<|user|>▁\n▁甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙<|assistant|>"
    messages = [user("甲"), answer("乙"), user("丙")]
    assert prompt(messages, chatglm3) == prompt([*messages, answer("丁")], chatglm3) == expected


def test_chatglm3_source_prefix_stands_in_front_of_the_first_question(chatglm3):
    messages = [Message("system", "公园"), user("甲"), answer("乙"), user("丙")]
    expected = "[gMASK]sop<|system|>▁\n▁公园<|user|>▁\n▁请问甲<|assistant|>▁\n▁乙<|user|>▁\n▁丙<|assistant|>"
    assert prompt(messages, chatglm3, "请问") == expected


def test_chatglm3_prompt_is_the_one_of_the_tokenizer(chatglm3):
    messages = [Message("system", "公园"), user("甲"), answer("乙"), user("今天 天气\n好吗")]
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    ids = chatglm3.chat.encode_prompt(Conversation(messages))
    assert ids == chatglm3.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    chat = chatglm3.build_chat_input(dicts[-1]["content"], history=dicts[:-1])
    assert ids == list(chat["input_ids"][0])


# ChatGLM2


def test_chatglm2_single_turn(chatglm2):
    expected = "[gMASK]sop▁[Round▁1]\n\n问：你好\n\n答：【▁谁</s>】"
    assert marked([user("你好"), answer("谁")], chatglm2) == expected


def test_chatglm2_history_is_part_of_the_prompt(chatglm2):
    messages = [Message("system", "公园"), user("甲"), answer("乙", loss=False), user("丙"), answer("丁")]
    assert marked(messages, chatglm2) == (
        "[gMASK]sop▁公园\n\n[Round▁1]\n\n问：甲\n\n答：乙\n\n[Round▁2]\n\n问：丙\n\n答：【▁丁</s>】"
    )


def test_chatglm2_generation_prompt_and_source_prefix(chatglm2):
    messages = [user("甲"), answer("乙", loss=False), user("丙")]
    expected = "[gMASK]sop▁请问[Round▁1]\n\n问：甲\n\n答：乙\n\n[Round▁2]\n\n问：丙\n\n答："
    assert prompt(messages, chatglm2, "请问") == prompt([*messages, answer("丁")], chatglm2, "请问") == expected


@pytest.mark.parametrize("history", [[], [("甲", "乙")], [("甲 a", "乙"), ("", "丙\n丁")]])
def test_chatglm2_is_the_official_recipe(chatglm2, history):
    query, response, source_prefix = "今天天气 好吗？", "很好。<unk></s>", "请问："
    pieces = chatglm2.vocabulary.processor
    text = source_prefix
    for number, (question, reply) in enumerate(history):
        text += f"[Round {number + 1}]\n\n问：{question}\n\n答：{reply}\n\n"
    text += f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："
    a_ids = [pieces.vocab_size() + 1, pieces.vocab_size() + 3, *pieces.encode(text)]
    b_ids = [*pieces.encode(response), pieces.eos_id()]

    messages = [message for question, reply in history for message in (user(question), answer(reply, loss=False))]
    encoded = chatglm2.chat.encode(Conversation([*messages, user(query), answer(response)], source_prefix))
    assert encoded.input_ids == a_ids + b_ids
    assert encoded.loss_mask == [False] * len(a_ids) + [True] * len(b_ids)
    assert encoded.answer_start == len(a_ids)
    by_tokenizer = chatglm2.encode(source_prefix + chatglm2.build_prompt(query, history))
    assert chatglm2.chat.encode_prompt(Conversation([*messages, user(query)], source_prefix)) == by_tokenizer


def test_chatglm2_refuses_unsupported_conversations(chatglm2):
    with pytest.raises(ValueError, match=r"alternate.*found user, user"):
        chatglm2.chat.encode(Conversation([user("甲"), user("乙"), answer("丙")]))
    with pytest.raises(ValueError, match="has no tools"):
        chatglm2.chat.encode(Conversation([user("甲"), answer("f()", "get")]))
    with pytest.raises(ValueError, match="has no tools"):
        chatglm2.chat.encode(Conversation([user("甲"), Message("observation", "雨"), answer("乙")]))
    with pytest.raises(ValueError, match="only the last answer"):
        chatglm2.chat.encode(Conversation([user("甲"), answer("乙"), user("丙"), answer("丁")]))


# Both


def test_splitting_keeps_every_answer_to_be_learned_once(chatglm2, chatglm3):
    messages = [user("甲"), answer("乙"), user("丙"), answer("丁", loss=False), user("戊"), answer("己"), user("庚")]
    whole = Conversation(messages, "请问")
    assert [marked(part.messages, chatglm2, part.source_prefix) for part in chatglm2.chat.training_parts(whole)] == [
        "[gMASK]sop▁请问[Round▁1]\n\n问：甲\n\n答：【▁乙</s>】",
        "[gMASK]sop▁请问[Round▁1]\n\n问：甲\n\n答：乙\n\n[Round▁2]\n\n问：丙\n\n答：丁\n\n[Round▁3]\n\n问：戊\n\n答：【▁己</s>】",
    ]
    assert chatglm3.chat.training_parts(whole) == [Conversation(messages[:-1], "请问", followed_by="user")]
    silent = Conversation([user("甲"), answer("乙", loss=False)])
    assert chatglm2.chat.training_parts(silent) == chatglm3.chat.training_parts(silent) == []


def test_text_that_spells_special_tokens_stays_text(chatglm2, chatglm3):
    for tokenizer in (chatglm2, chatglm3):
        ids = tokenizer.chat.encode(Conversation([user("<|user|>[gMASK]"), answer("</s>")])).input_ids
        special = [index for index in ids if index >= tokenizer.vocabulary.pieces]
        assert len(special) == (2 if tokenizer is chatglm2 else 4)
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_a_real_unk_is_learned_although_it_is_the_pad_id(tmp_path):
    tokenizer = train(tmp_path, "chatglm3", byte_fallback=False)
    assert tokenizer.pad_token_id == tokenizer.encode("鑫", add_special_tokens=False)[-1] == 0
    expected = "[gMASK]sop<|user|>▁\n▁<unk><|assistant|>【▁\n▁你<unk></s>】"
    assert marked([user("鑫"), answer("你鑫")], tokenizer) == expected


def test_stop_ids(chatglm2, chatglm3):
    assert chatglm2.chat.stop_ids == [2]
    pieces = chatglm3.vocabulary.pieces
    assert chatglm3.chat.stop_ids == [2, pieces + 6, pieces + 8]
    assert spell(chatglm3, chatglm3.chat.stop_ids) == "</s><|user|><|observation|>"
