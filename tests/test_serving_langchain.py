"""LangChain's ChatOpenAI against the server."""

from __future__ import annotations

import pytest
from api_server import serving
from tiny_base import ANSWERS

langchain_openai = pytest.importorskip(
    "langchain_openai", reason="needs langchain-openai: pip install langchain-openai"
)


def test_chat_openai(base, tmp_path):
    with serving(base, tmp_path, slots=2) as server:
        chat = langchain_openai.ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="none", model="base", temperature=0, max_retries=0, stream_usage=True
        )
        reply = chat.invoke([("system", "今天"), ("human", "你好"), ("ai", "你好"), ("human", "问")])
        assert reply.response_metadata["finish_reason"] in ("stop", "length")
        assert chat.invoke("问").content == ANSWERS["问"]
        chunks = list(chat.stream("问"))
        assert "".join(chunk.content for chunk in chunks) == ANSWERS["问"]
        assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0
        assert [one.content for one in chat.batch(list(ANSWERS)[:4])] == list(ANSWERS.values())[:4]
        tool = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}
        assert chat.bind_tools([tool]).invoke("问", max_tokens=4).content is not None
