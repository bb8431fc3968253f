"""Who may do what: API keys, the admin's routes, sizes of requests, addresses; and what the log says."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time

import httpx2
import openai
import pytest
from api_server import serving
from tiny_base import make_prefix

from chatglm_ptuning.serving.api import guard
from chatglm_ptuning.serving.api.command import ServeArguments

REQUEST = {"model": "base", "messages": [{"role": "user", "content": "问"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    make_prefix(base, folder / "prefixes" / "ads", "今天有雨")
    (folder / "keys").write_text("file-key\n")
    (folder / "admin").write_text("admin-key\n")
    with serving(
        base, folder / "prefixes", api_key=["flag-key"], api_key_file=str(folder / "keys"),
        admin_key_file=str(folder / "admin"), max_request_kb=4, slots=2,
    ) as running:  # fmt: skip
        yield running


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_the_right_keys(server):
    for key in ("flag-key", "file-key", "admin-key"):
        assert server.client(key).chat.completions.create(**REQUEST).choices


@pytest.mark.parametrize("key", ["wrong", "flag-ke", "flag-key-", "FLAG-KEY"])
def test_a_wrong_key(server, key):
    with pytest.raises(openai.AuthenticationError) as raised:
        server.client(key).chat.completions.create(**REQUEST)
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/ads", "/metrics", "/openapi.json", "/nothing"])
def test_every_path_but_the_health_needs_a_key(server, path):
    assert httpx2.get(server.url + path).status_code == 401
    assert httpx2.get(server.url + path, headers={"Authorization": "Basic flag-key"}).status_code == 401
    assert httpx2.get(server.url + path, headers=bearer("flag-key")).status_code in (200, 404)


def test_the_health_needs_none(server):
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_key_is_checked_before_the_body(server):
    response = httpx2.post(f"{server.url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 401


class TestPrefixes:
    def change(self, server, method="POST", name="ads", key="admin-key"):
        address, body = f"{server.url}/v1/prefixes", {"name": name}
        if method == "DELETE":
            return httpx2.delete(f"{address}/{name}", headers=bearer(key))
        return httpx2.post(address, json=body, headers=bearer(key))

    def test_only_the_admin_changes_prefixes(self, server):
        for method in ("POST", "DELETE"):
            assert self.change(server, method, key="flag-key").status_code == 403
            assert self.change(server, method, key="wrong").status_code == 401

    def test_unload_and_load_again(self, server):
        client = server.client("flag-key")
        assert client.chat.completions.create(**REQUEST | {"model": "ads"}).choices
        assert server.service.engine.stats().prefixes_loaded == 1
        assert self.change(server, "DELETE").json()["deleted"] is True
        assert server.service.engine.stats().prefixes_loaded == 0
        assert [model.id for model in client.models.list()] == ["base"]
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(**REQUEST | {"model": "ads"})
        assert self.change(server).json()["id"] == "ads"
        assert server.service.engine.stats().prefixes_loaded == 1
        assert client.chat.completions.create(**REQUEST | {"model": "ads"}).choices

    def test_a_new_folder_is_served(self, server):
        folder = server.prefix_dir
        shutil.copytree(folder / "ads", folder / "new")
        try:
            client = server.client("flag-key")
            assert client.chat.completions.create(**REQUEST | {"model": "new"}).choices
            assert [model.id for model in client.models.list()] == ["base", "ads", "new"]
        finally:
            shutil.rmtree(folder / "new")

    @pytest.mark.parametrize("name", ["none", "../prefixes/ads", "/etc", "..", "", "\x00"])
    def test_other_names(self, server, name):
        response = self.change(server, name=name)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"

    def test_the_base_stays(self, server):
        assert self.change(server, "DELETE", "base").status_code == 400
        assert self.change(server, "POST", "base").status_code == 400


def send_then_read(server, head, body, piece=2**16, pause=0.0):
    """Sends the whole body in pieces, whatever the server does, and only then reads the response."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        for start in range(0, len(body), piece):
            connection.sendall(body[start : start + piece])
            time.sleep(pause)
        reply = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, content = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)["error"]


class TestRefusedWhileTheClientSends:
    BODY = b"a" * 3 * 2**20
    CHUNKED = b"".join(b"10000\r\n" + b"a" * 2**16 + b"\r\n" for _ in range(48)) + b"0\r\n\r\n"
    POST = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
    KEY = "\r\nAuthorization: Bearer flag-key"
    LENGTH = f"\r\nContent-Length: {len(BODY)}"

    @pytest.mark.parametrize("connection", ["", "\r\nConnection: close"])
    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize(("key", "status", "code"), [("", 401, "invalid_api_key"), (KEY, 413, "request_too_large")])
    def test_the_client_gets_the_status(self, server, connection, is_chunked, key, status, code):
        length = "\r\nTransfer-Encoding: chunked" if is_chunked else self.LENGTH
        body = self.CHUNKED if is_chunked else self.BODY
        got, error = send_then_read(server, self.POST + key + length + connection, body, pause=0.002)
        assert (got, error["code"]) == (status, code)
        assert error.keys() == {"message", "type", "param", "code"}

    def test_the_admin_routes(self, server):
        head = self.POST.replace("completions", "prefixes") + self.KEY + self.LENGTH
        got, error = send_then_read(server, head, self.BODY)
        assert (got, error["code"]) == (403, "admin_key_needed")

    def test_a_slow_client(self, server, monkeypatch):
        monkeypatch.setattr(guard, "_SECONDS_FOR_A_BODY", 0.1)
        body = b"a" * 1000
        head = f"{self.POST}{self.KEY}\r\nContent-Length: {len(body)}"
        got, error = send_then_read(server, head, body, piece=200, pause=0.1)
        assert (got, error["code"]) == (408, "timeout")

    @pytest.mark.parametrize(("name", "limit"), [("_SECONDS_TO_DISCARD", 0.2), ("_BYTES_TO_DISCARD", 1000)])
    def test_the_server_does_not_wait_forever(self, server, monkeypatch, name, limit):
        monkeypatch.setattr(guard, name, limit)
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall((self.POST + self.KEY + self.LENGTH).encode() + b"\r\n\r\n" + b"a" * 2000)
            reply = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert reply.startswith(b"HTTP/1.1 413") and b"connection: close" in reply

    def test_a_client_that_waits_for_leave_to_send(self, server):
        head = self.POST + self.KEY + self.LENGTH + "\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(head.encode())
            assert connection.recv(2**16).startswith(b"HTTP/1.1 413")

    def test_a_request_without_body_is_refused_at_once(self, server):
        start = time.monotonic()
        for _ in range(3):
            assert httpx2.get(f"{server.url}/v1/models").status_code == 401
        assert time.monotonic() - start < 5


class TestSizes:
    def test_a_large_body(self, server):
        response = httpx2.post(f"{server.url}/v1/completions", json={"prompt": "a" * 5000}, headers=bearer("flag-key"))
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def test_a_large_body_of_unknown_size(self, server):
        parts = (b"a" * 1000 for _ in range(10))
        response = httpx2.post(f"{server.url}/v1/completions", content=parts, headers=bearer("flag-key"))
        assert response.status_code == 413

    def test_a_body_that_does_not_arrive(self, server, monkeypatch):
        monkeypatch.setattr(guard, "_SECONDS_FOR_A_BODY", 0.1)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer flag-key\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_log_has_no_texts(server, caplog, monkeypatch):
    # Other tests may have set levels of these loggers, or turned them off.
    for name in ("chatglm_ptuning", "chatglm_ptuning.serving", "chatglm_ptuning.serving.api.guard"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        caplog.set_level(logging.DEBUG, logger=name)
    with caplog.at_level(logging.DEBUG):
        server.client("flag-key").chat.completions.create(
            model="base", messages=[{"role": "user", "content": "secret words"}], max_tokens=2
        )
        httpx2.get(f"{server.url}/v1/models?secret=words", headers=bearer("wrong-secret"))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("chatglm", "uvicorn.error"))]
    assert any("POST /v1/chat/completions 200" in line for line in ours)
    assert not any("secret" in line or "flag-key" in line for line in ours)


class TestAddresses:
    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
    def test_another_address_needs_a_key(self, host, monkeypatch, tmp_path):
        monkeypatch.delenv("CHATGLM_PTUNING_API_KEY", raising=False)
        with pytest.raises(ValueError, match=r"--api_key_file.*--no_api_key"):
            ServeArguments(host=host).keys()
        assert ServeArguments(host=host, no_api_key=True).keys() == ([], [])
        assert ServeArguments(host=host, api_key=["a"]).keys() == (["a"], [])
        monkeypatch.setenv("CHATGLM_PTUNING_API_KEY", "b c")
        assert ServeArguments(host=host).keys() == (["b", "c"], [])

    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.5"])
    def test_the_own_address_needs_none(self, host, monkeypatch):
        monkeypatch.delenv("CHATGLM_PTUNING_API_KEY", raising=False)
        assert ServeArguments(host=host).keys() == ([], [])

    def test_a_file_without_keys(self, tmp_path):
        (tmp_path / "keys").write_text("\n")
        with pytest.raises(ValueError, match="keys has no key"):
            ServeArguments(api_key_file=str(tmp_path / "keys")).keys()


class TestPagesOfOtherSites:
    """A web page in a visitor's browser must not use a server without keys on this machine."""

    @pytest.fixture(scope="class")
    def open_server(self, base, tmp_path_factory):
        with serving(base, tmp_path_factory.mktemp("open"), slots=1) as running:
            yield running

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[", "10.0.0.1", ""]
    )
    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/health"])
    def test_another_name_for_this_machine(self, open_server, host, path):
        response = httpx2.get(open_server.url + path, headers={"Host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "127.0.0.5"])
    def test_its_own_names(self, open_server, host):
        assert httpx2.get(f"{open_server.url}/v1/models", headers={"Host": host}).status_code == 200

    def test_programs_without_a_host(self, open_server):
        with socket.create_connection(("127.0.0.1", open_server.port)) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")

    @pytest.mark.parametrize("kind", ["text/plain", None, "application/x-www-form-urlencoded"])
    def test_a_post_that_needs_no_leave_of_the_server(self, open_server, kind):
        headers = {"Origin": "http://evil.example"} | ({"Content-Type": kind} if kind else {})
        response = httpx2.post(
            f"{open_server.url}/v1/chat/completions", content=json.dumps(REQUEST).encode(), headers=headers
        )
        assert response.status_code == 400
        assert "access-control-allow-origin" not in response.headers

    def test_with_keys_any_name_is_right(self, server):
        headers = bearer("flag-key") | {"Host": "llm.example"}
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 200


def test_without_an_admin_key_nobody_changes_prefixes(base, tmp_path):
    with serving(base, tmp_path, slots=1) as running:
        response = httpx2.post(f"{running.url}/v1/prefixes", json={"name": "ads"}, headers=bearer("any"))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "no_admin_key")
