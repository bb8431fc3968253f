"""The middleware that makes each exported prefix a model of vLLM's own server; vLLM is not needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from chatglm_ptuning.prefix.formats import kit, vllm
from chatglm_ptuning.serving.vllm.plugin.ptuning_vllm.middleware import PrefixModels
from chatglm_ptuning.serving.vllm.plugin.ptuning_vllm.prefixes import PrefixFolder, prefix_prompt

PLACEHOLDER = 7


@pytest.fixture
def folder(prefix_folders, tiny_config, tmp_path):
    """A folder with the exported prefix "ads", of 3 virtual tokens."""
    shape = tiny_config().prefix_shape
    vllm.write(tmp_path, kit.read(prefix_folders["a"], shape), shape, "ads")
    (tmp_path / "other.vllm.safetensors").write_bytes(b"no prefix")
    return tmp_path


def usage(body: dict[str, Any]) -> dict[str, Any]:
    prompts = body["prompt"] if isinstance(body.get("prompt", [0])[0], list) else [body.get("prompt", [0])]
    count = sum(map(len, prompts))
    return {"prompt_tokens": count, "completion_tokens": 1, "total_tokens": count + 1,
            "prompt_tokens_details": {"cached_tokens": count - 1}}  # fmt: skip


@pytest.fixture
def client(folder, monkeypatch) -> TestClient:
    """A server as vLLM is one, behind the middleware. `seen` has the bodies that it got."""
    seen: list[dict[str, Any]] = []

    async def complete(request: Request):
        seen.append(body := await request.json())
        whole = {
            "model": body.get("model"),
            "choices": [{"index": 0, "text": "好", "prompt_token_ids": body.get("prompt")}],
        }
        if not body.get("stream"):
            return JSONResponse(whole | {"usage": usage(body)})

        async def events():
            text = (
                f"data: {json.dumps(whole)}\n\ndata: {json.dumps({**whole, 'choices': [], 'usage': usage(body)})}\n\n"
            )
            for start in range(0, len(text), 50):  # events may be cut anywhere
                yield text[start : start + 50]
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def models(request: Request):
        return JSONResponse({"object": "list", "data": [{"id": "base"}]})

    paths = ("/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/v1/responses")
    app = Starlette(routes=[*(Route(path, complete, methods=["POST"]) for path in paths), Route("/v1/models", models)])
    monkeypatch.setenv("PTUNING_PREFIX_DIR", str(folder))
    monkeypatch.setenv("PTUNING_PLACEHOLDER_ID", str(PLACEHOLDER))
    app.add_middleware(PrefixModels)
    made = TestClient(app)
    made.seen = seen
    return made


def test_every_prefix_is_a_model(client, folder):
    assert [(model["id"], model.get("parent")) for model in client.get("/v1/models").json()["data"]] == [
        ("base", None),
        ("ads", "base"),
    ]


def test_a_request_gets_placeholders_and_the_hash_of_the_prefix(client, folder):
    reply = client.post("/v1/completions", json={"model": "ads", "prompt": [50, 51], "temperature": 0}).json()
    prefix = PrefixFolder(folder).by_name()["ads"]
    ids = [PLACEHOLDER] * 3 + [50, 51]
    assert client.seen == [
        {"model": "base", "prompt": ids, "cache_salt": f"ptuning:{prefix.content_hash}", "temperature": 0}
    ]
    assert prefix_prompt(prefix, [50, 51], PLACEHOLDER) == {"prompt_token_ids": ids, "cache_salt": prefix.salt}
    assert reply["model"] == "ads"
    assert reply["choices"][0]["prompt_token_ids"] == [50, 51]
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"]) == (2, 3)
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_several_prompts_and_tokens_alone(client):
    reply = client.post("/v1/completions", json={"model": "ads", "prompt": [[50], [51, 52]]}).json()
    assert client.seen[0]["prompt"] == [[PLACEHOLDER] * 3 + [50], [PLACEHOLDER] * 3 + [51, 52]]
    assert reply["usage"]["prompt_tokens"] == 3
    client.post("/inference/v1/generate", json={"model": "ads", "token_ids": [50], "sampling_params": {"n": 1}})
    assert client.seen[1]["token_ids"] == [PLACEHOLDER] * 3 + [50]


def test_a_stream(client):
    text = client.post("/v1/completions", json={"model": "ads", "prompt": [50], "stream": True}).text
    first, last, done = (event.removeprefix("data: ") for event in text.strip().split("\n\n"))
    assert (json.loads(first)["model"], json.loads(first)["choices"][0]["text"]) == ("ads", "好")
    assert json.loads(last)["usage"]["prompt_tokens"] == 1
    assert done == "[DONE]"


def test_the_base_is_left_alone(client):
    body = {"model": "base", "prompt": "问", "echo": True, "cache_salt": "mine"}
    assert client.post("/v1/completions", json=body).json()["model"] == "base"
    assert client.seen == [body]
    assert client.post("/v1/completions", json={"model": "nobody", "prompt": "问"}).json()["model"] == "nobody"


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/v1/completions", {"prompt": [1], "echo": True}, "echo"),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": 0}, "prompt_logprobs"),
        ("/v1/completions", {"prompt": [1], "truncate_prompt_tokens": 4}, "truncate_prompt_tokens"),
        ("/v1/completions", {"prompt": [1], "cache_salt": "mine"}, "cache_salt"),
        ("/v1/completions", {"prompt": [1], "use_beam_search": True}, "use_beam_search"),
        ("/v1/completions", {"prompt": "问"}, "token ids"),
        ("/v1/completions", {"prompt": ["问"]}, "token ids"),
        ("/v1/completions", {"prompt": []}, "token ids"),
        ("/v1/completions", {"prompt": [[]]}, "token ids"),
        ("/v1/completions", {}, "token ids"),
        ("/v1/completions", {"prompt": [True]}, "token ids"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ("/v1/chat/completions", {"messages": []}, "serve --engine vllm"),
        ("/v1/responses", {"input": "问"}, "serve --engine vllm"),
    ],
)
def test_what_cannot_be_had_with_a_prefix(client, path, fields, named):
    reply = client.post(path, json={"model": "ads", **fields})
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]
    assert client.seen == []


@pytest.mark.parametrize("model", ["base", "ads", None])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/inference/v1/generate"])
def test_nobody_sets_the_salt_of_a_prefix(client, model, path):
    reply = client.post(path, json={"model": model, "prompt": [1], "cache_salt": "ptuning:0"})
    assert (reply.status_code, client.seen) == (400, [])
    assert "cache_salt" in reply.json()["error"]["message"]


def test_a_replaced_prefix_has_another_salt(client, folder, prefix_folders, tiny_config):
    shape = tiny_config().prefix_shape
    client.post("/v1/completions", json={"model": "ads", "prompt": [50]})
    before = PrefixFolder(folder).by_name()["ads"]
    vllm.write(folder, kit.read(prefix_folders["b"], shape), shape, "ads")
    client.post("/v1/completions", json={"model": "ads", "prompt": [50]})
    one, other = client.seen
    assert one["cache_salt"] != other["cache_salt"]
    assert (len(one["prompt"]), len(other["prompt"])) == (4, 6)
    with pytest.raises(ValueError, match="was replaced"):
        before.read()  # a worker must not put the new one into blocks of the old one


def test_the_connector_finds_a_prefix_by_its_salt(folder):
    prefixes = PrefixFolder(folder)
    prefix = prefixes.by_name()["ads"]
    assert prefixes.of_salt(prefix.salt) == prefix
    assert prefixes.of_salt(None) is None is prefixes.of_salt("mine")
    with pytest.raises(KeyError):
        prefixes.of_salt("ptuning:0")
    assert prefix.read().shape == (2, 2, 3, 2, 8)
