"""The HTTP API through the openai package, against a real server."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from api_server import serving, wait_for
from tiny_base import ANSWERS, make_prefix

from chatglm_ptuning.serving.engine.request import SamplingSettings

PROMPT = "天气很好，请问你今天想去公园散步吗"
ANSWER = ANSWERS["问"]


@pytest.fixture(scope="module")
def prefixes(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefixes")
    for name, text in (("ads", "今天有雨"), ("qa", "我想去公园")):
        make_prefix(base, folder / name, text)
    return folder


@pytest.fixture(scope="module")
def server(base, prefixes):
    with serving(base, prefixes, slots=4, queue_limit=6, max_choices=4) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


def ask(client, text="问", model="base", **settings):
    settings = {"temperature": 0, "max_tokens": 40} | settings
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **settings)


def complete(client, prompt, **settings):
    return client.completions.create(model="base", prompt=prompt, **{"temperature": 0, "max_tokens": 8} | settings)


def post(server, path="/v1/chat/completions", **body):
    body = {"model": "base", "messages": [{"role": "user", "content": "问"}], "max_tokens": 2} | body
    return httpx2.post(server.url + path, json={key: value for key, value in body.items() if value != "MISSING"})


def error_of(response) -> dict:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


class TestChat:
    @pytest.mark.parametrize("question", ANSWERS)
    def test_the_base_answers(self, client, question):
        reply = ask(client, question)
        assert reply.choices[0].message.content == ANSWERS[question]
        assert reply.choices[0].finish_reason == "stop"
        assert (reply.object, reply.model) == ("chat.completion", "base")

    def test_a_stream_has_the_same_text_in_pieces(self, client):
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(texts) == ANSWER
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        whole = ask(client).usage
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
            whole.prompt_tokens, whole.completion_tokens,
        )  # fmt: skip
        assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])

    def test_usage_counts_tokens(self, client, server):
        usage = ask(client, max_tokens=3).usage
        turn = server.service.tokenizer.build_chat_input("问", [])["input_ids"][0]
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(turn), 3)
        assert usage.total_tokens == len(turn) + 3

    def test_prefixes_answer_by_their_names(self, client, server):
        model, tokenizer = server.service.engine.model, server.service.tokenizer
        for name in ("ads", "qa"):
            model.load_prefix(server.prefix_dir / name, name)
            expected, _ = model.chat(tokenizer, "问", do_sample=False, prefix=name, max_new_tokens=20)
            assert expected != ANSWER
            assert ask(client, model=name, max_tokens=20).choices[0].message.content == expected

    def test_requests_of_many_models_at_once(self, client):
        wanted = [("base", question) for question in ANSWERS] + [("ads", "问"), ("qa", "问"), ("ads", "你是谁")]
        alone = [ask(client, text, model, max_tokens=12).choices[0].message.content for model, text in wanted]
        with ThreadPoolExecutor(5) as pool:
            together = list(pool.map(lambda one: ask(client, one[1], one[0], max_tokens=12), wanted))
        assert [reply.choices[0].message.content for reply in together] == alone

    def test_the_history_counts(self, client):
        history = [
            {"role": "system", "content": "今天"}, {"role": "user", "content": [{"type": "text", "text": "你好"}]},
            ask(client).choices[0].message.model_dump(), {"role": "user", "content": "问", "name": "a"},
        ]  # fmt: skip
        reply = client.chat.completions.create(model="base", messages=history, max_tokens=1)
        assert reply.usage.prompt_tokens > 20

    def test_several_answers(self, client):
        reply = ask(client, n=3, temperature=2.0, seed=1, max_tokens=12)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in reply.choices]
        assert len(set(texts)) > 1
        streamed = ["", "", ""]
        for chunk in ask(client, n=3, temperature=2.0, seed=1, max_tokens=12, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert streamed == texts

    def test_a_seed_repeats_an_answer(self, client):
        first, second, other = (
            ask(client, temperature=2.0, seed=seed, max_tokens=20).choices[0].message.content for seed in (7, 7, 8)
        )
        assert first == second != other

    def test_the_end_of_the_tokens(self, client):
        choice = ask(client, max_completion_tokens=4, max_tokens=None).choices[0]
        assert choice.finish_reason == "length"
        assert ANSWER.startswith(choice.message.content)
        assert ask(client, max_tokens=None).choices[0].message.content == ANSWER  # as many as fit

    def test_stop_strings(self, client):
        choice = ask(client, stop=["谁？我", "没有"]).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("请问你是", "stop")
        chunks = list(ask(client, stop="谁？我", stream=True))
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(texts) == "请问你是" and chunks[-1].choices[0].finish_reason == "stop"

    def test_log_probabilities(self, client):
        entries = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in entries).decode().strip() == ANSWER
        for entry in entries:
            assert len(entry.top_logprobs) == 2
            assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy
        assert ask(client).choices[0].logprobs is None
        streamed = [
            entry
            for chunk in ask(client, logprobs=True, stream=True)
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content
        ]
        assert [entry.token for entry in streamed] == [entry.token for entry in entries]
        stopped = ask(client, logprobs=True, stop="谁？我").choices[0].logprobs.content
        assert b"".join(bytes(entry.bytes) for entry in stopped).decode().strip() == "请问你是"

    def test_repeating_can_be_made_less_probable(self, client):
        settings = {"temperature": 1.5, "seed": 3, "max_tokens": 30}
        plain = ask(client, **settings).choices[0].message.content
        assert ask(client, **settings, extra_body={"top_k": 1}).choices[0].message.content == ANSWER
        assert ask(client, **settings, extra_body={"repetition_penalty": 5.0}).choices[0].message.content != plain


class TestCompletions:
    def test_a_text_is_continued(self, client, server):
        tokenizer, model = server.service.tokenizer, server.service.engine.model
        ids = tokenizer("今天天", return_tensors="pt")["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=8, prefix=model.prefix_batch(None))[0]
        reply = complete(client, "今天天")
        whole = tokenizer.decode(expected, skip_special_tokens=True)
        assert "今天天" + reply.choices[0].text == whole
        assert reply.usage.prompt_tokens == ids.shape[1]
        assert complete(client, "今天天", echo=True).choices[0].text == whole
        assert complete(client, ids[0].tolist()).choices[0].text == reply.choices[0].text
        assert complete(client, ids[0, 2:].tolist()).choices[0].text == reply.choices[0].text
        streamed = complete(client, "今天天", stream=True, echo=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == whole

    def test_several_prompts(self, client):
        reply = complete(client, ["今天", "你好"], n=2)
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in reply.choices]
        assert texts[0] == texts[1] == complete(client, "今天").choices[0].text
        assert texts[2] == texts[3] == complete(client, "你好").choices[0].text
        alone = [complete(client, prompt).usage for prompt in ("今天", "你好")]
        assert reply.usage.completion_tokens == 2 * sum(usage.completion_tokens for usage in alone)
        assert reply.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone)

    def test_log_probabilities(self, client):
        choice = complete(client, "今天", logprobs=2).choices[0]
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset[0] == 0
        for logprob, top in zip(choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True):
            assert logprob == max(top.values())


class TestModels:
    def test_the_base_and_every_prefix(self, client, server):
        models = {model.id: model for model in client.models.list()}
        assert list(models) == ["base", "ads", "qa"]
        assert models["ads"].pre_seq_len == len(server.service.tokenizer("今天有雨")["input_ids"])
        assert models["ads"].to_dict().keys() >= {"task", "training"}
        assert client.models.retrieve("ads").id == "ads"

    @pytest.mark.parametrize("name", ["none", "../ads", "..", "ads/../qa", ".", "/etc", "base/", "\x00", "a" * 5000])
    def test_an_unknown_model(self, client, name):
        with pytest.raises(openai.NotFoundError) as raised:
            ask(client, model=name)
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")

    def test_an_unknown_model_by_its_address(self, server):
        for name in ("none", "..", "%2e%2e", "..%2fads", "%00"):
            assert error_of(httpx2.get(f"{server.url}/v1/models/{name}"))["code"] in ("model_not_found", "not_found")


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "param", "named"),
        [
            ({"messages": "MISSING"}, "messages", "required"),
            ({"model": "MISSING"}, "model", "required"),
            ({"messages": []}, "messages", "1"),
            ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0]", "nobody"),
            ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
            ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
             "messages[0].content[0].type", "text"),
            ({"temperature": -1}, "temperature", "0"),
            ({"temperature": "1"}, "temperature", "number"),
            ({"top_p": 2}, "top_p", "1"),
            ({"n": 0}, "n", "1"),
            ({"n": 5}, "n", "4"),
            ({"max_tokens": 0}, "max_tokens", "1"),
            ({"max_tokens": True}, "max_tokens", "integer"),
            ({"stop": [""]}, "stop", "1"),
            ({"seed": 2**64}, "seed", "less"),
            ({"top_logprobs": 2}, None, "logprobs"),
            ({"stream_options": {"include_usage": True}}, None, "stream"),
            ({"no_such_field": 1}, "no_such_field", "no such parameter"),
            ({"response_format": {"type": "json_object"}}, "response_format", "response_format"),
            ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "response_format"),
            ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
            ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty"),
            ({"presence_penalty": -1}, "presence_penalty", "presence_penalty"),
            ({"functions": [{"name": "a"}]}, "functions", "functions"),
            ({"tool_choice": "required"}, "tool_choice", "none"),
            ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function", "name"),
            ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools[0].function",
             "strict"),
            ({"reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort"),
            ({"max_tokens": 5000}, "max_tokens", "256"),
            ({"messages": [{"role": "user", "content": "天" * 300}]}, "messages", "256"),
        ],
    )  # fmt: skip
    def test_a_wrong_field_is_named(self, server, fields, param, named):
        response = post(server, **fields)
        assert response.status_code == 400
        error = error_of(response)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert named in error["message"]

    def test_fields_that_change_nothing_are_accepted(self, server):
        response = post(
            server, user="a", metadata={"a": "b"}, store=True, service_tier="auto", seed=None, logit_bias={}, n=None,
            response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0, modalities=["text"],
            tool_choice="none", parallel_tool_calls=True, prompt_cache_key="a", safety_identifier="a", stop=None,
        )  # fmt: skip
        assert response.status_code == 200, response.text

    @pytest.mark.parametrize(
        ("content", "code"),
        [(b"", "invalid_value"), (b"{", "invalid_json"), (b"[]", "invalid_value"), (b"5", "invalid_value"),
         (b"\xff\xfe", None), (b'{"model":' + b"[" * 100000, None)],
    )  # fmt: skip
    def test_a_body_that_is_no_request(self, server, content, code):
        response = httpx2.post(
            f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400
        assert code is None or error_of(response)["code"] == code

    def test_a_body_of_another_type(self, server):
        text = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1})
        response = httpx2.post(f"{server.url}/v1/completions", content=text, headers={"Content-Type": "text/plain"})
        assert response.status_code == 400 and "application/json" in error_of(response)["message"]

    def test_a_surrogate_in_a_text(self, server):
        accepted = {"prompt": "\ud800", "stop": "\ud800"}
        for fields in (accepted, {"model": "\ud800"}, {"\ud800": 1}, {"temperature": float("nan")}):
            body = json.dumps({"model": "base", "prompt": "a", "max_tokens": 1} | fields)
            response = httpx2.post(
                f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}
            )
            assert response.status_code == 200 if fields is accepted else 400 <= response.status_code < 500
            assert response.json()

    def test_unknown_paths_and_methods(self, server):
        assert error_of(httpx2.get(f"{server.url}/nothing"))["code"] == "not_found"
        response = httpx2.get(f"{server.url}/v1/chat/completions")
        assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
        assert "POST" in response.headers["Allow"]

    def test_an_id_outside_the_vocabulary(self, client):
        with pytest.raises(openai.BadRequestError, match="999999"):
            complete(client, [5, 999999])

    def test_too_many_prompts(self, client):
        with pytest.raises(openai.BadRequestError, match="4 answers"):
            complete(client, ["a"] * 5)

    def test_log_probabilities_of_a_prompt(self, client):
        with pytest.raises(openai.BadRequestError, match="echo"):
            complete(client, "a", echo=True, logprobs=1)


class TestLoad:
    def test_a_full_queue_answers_429(self, server):
        engine = server.service.engine
        wait_for(lambda: engine.stats().running == 0)
        endless = SamplingSettings(max_new_tokens=250)
        running = [engine.submit([5], endless) for _ in range(10)]  # 4 slots, and 6 that wait
        response = post(server)
        for generation in running:
            generation.cancel()
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        error = error_of(response)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_ends_its_answer(self, server, stream, monkeypatch):
        engine = server.service.engine
        step = engine._scheduler.step
        monkeypatch.setattr(engine._scheduler, "step", lambda: time.sleep(0.02) or step())  # else the answer may end
        wait_for(lambda: engine.stats().running == 0)
        cancelled = engine.stats().requests.get("cancelled", 0)
        body = json.dumps({"model": "base", "prompt": "问", "max_tokens": 250, "n": 4, "temperature": 2.0,
                           "stream": stream}).encode()  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            wait_for(lambda: engine.stats().running > 0)
        wait_for(lambda: engine.stats().running == 0)
        assert engine.stats().requests["cancelled"] > cancelled

    def test_a_worker_that_fails(self, client, server, monkeypatch):
        engine = server.service.engine
        step = engine._scheduler.step

        def fail_once():
            if engine.stats().generated_tokens > failing_from:
                monkeypatch.setattr(engine._scheduler, "step", step)
                raise RuntimeError("a fault")
            step()

        for stream in (False, True):
            failing_from = engine.stats().generated_tokens + 2
            monkeypatch.setattr(engine._scheduler, "step", fail_once)
            with pytest.raises(openai.APIError, match="engine failed") as raised:
                list(ask(client, stream=stream))
            assert raised.value.code == "engine_error"
            if not stream:
                assert raised.value.status_code == 500
            assert ask(client).choices[0].message.content == ANSWER

    def test_metrics(self, client, server):
        def value(name):
            lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        before = {
            name: value(name)
            for name in ("chatglm_requests_total", 'chatglm_tokens_total{kind="completion",model="base"}',
                         "chatglm_time_to_first_token_seconds_count", "chatglm_engine_generated_tokens_total")
        }  # fmt: skip
        tokens = ask(client).usage.completion_tokens
        wait_for(lambda: value("chatglm_engine_running") == 0)
        after = {name: value(name) for name in before}
        grown = [after[name] - before[name] for name in before]
        assert grown[0] >= 1 and grown[1] == tokens and grown[2] == 1 and grown[3] >= tokens
        for name in ("waiting", "cache_tokens", "cache_evictions_total", "prefix_evictions_total"):
            assert f"chatglm_engine_{name}" in httpx2.get(f"{server.url}/metrics").text

    def test_health(self, server):
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
