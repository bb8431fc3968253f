"""Random requests, made from the OpenAPI schema of the server, never make it fail."""

from __future__ import annotations

import httpx2
import pytest
from api_server import serving
from tiny_base import make_prefix

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install schemathesis")
hypothesis = pytest.importorskip("hypothesis")

KEY = {"Authorization": "Bearer admin"}


@pytest.mark.slow
def test_no_request_makes_the_server_fail(base, tmp_path):
    make_prefix(base, tmp_path / "prefixes" / "ads", "今天有雨")
    (tmp_path / "keys").write_text("admin")
    flags = {"admin_key_file": str(tmp_path / "keys"), "max_new_tokens": 8, "slots": 4}
    with serving(base, tmp_path / "prefixes", **flags) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)
        called = set()
        for operation in schema.get_all_operations():
            operation = operation.ok()

            @hypothesis.given(case=operation.as_strategy())
            @hypothesis.settings(
                max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
            )
            def call(case):
                response = case.call(headers=KEY)
                assert response.status_code < 500, response.text

            call()
            called.add(operation.path)
        assert {"/v1/chat/completions", "/v1/completions", "/v1/prefixes", "/v1/models/{model}"} <= called
        # With a model that exists, more of the requests are answered.
        for operation in schema.get_all_operations():
            operation = operation.ok()
            if not operation.path.endswith("completions"):
                continue

            @hypothesis.given(case=operation.as_strategy())
            @hypothesis.settings(
                max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), database=None
            )
            def ask(case):
                if isinstance(case.body, dict):
                    case.body["model"] = "ads"
                assert case.call(headers=KEY).status_code < 500

            ask()
        assert httpx2.get(f"{server.url}/health").status_code == 200
