"""Hub names: downloads through the real clients from a server on this machine; messages to offline users."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import tiny_chat_base
import torch

from chatglm_ptuning import cli
from chatglm_ptuning.model.hub import find_base
from chatglm_ptuning.model.loading import load_model, load_tokenizer

UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Points the Hugging Face client, which reads its environment when it is imported, to a server and a cache."""

    def use(url: str, offline: bool = False) -> None:
        settings = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": offline,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
        huggingface_hub.utils.close_session()

    yield use
    huggingface_hub.utils.close_session()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_chat_base.write_base(tmp_path_factory.mktemp("base") / "chatglm3-tiny")
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('remote code was run')", encoding="utf-8")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in the older form")
    return folder


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    older = tmp_path_factory.mktemp("older") / "v1"
    shutil.copytree(base, older)
    (older / "model.safetensors").unlink()
    with hub_server.serve({("THUDM/chatglm3-tiny", "main"): base, ("THUDM/chatglm3-tiny", "v1"): older}) as server:
        yield server


def test_names_are_fetched_without_code_and_then_work_offline(server, base, hub):
    hub(server.url)
    settings = find_base("THUDM/chatglm3-tiny", weights=False)
    assert files(settings) >= {"config.json", "tokenizer.model"}
    assert not [name for name in files(settings) if name.endswith((".safetensors", ".bin", ".py"))]
    found = find_base("THUDM/chatglm3-tiny")
    assert "model.safetensors" in files(found)
    assert not [name for name in files(found) if name.endswith((".bin", ".py"))]
    assert not [path for path in server.paths if path.endswith(".py")]
    asked = len(server.paths)
    for url, offline in ((server.url, True), (UNREACHABLE, False)):
        hub(url, offline)
        assert find_base("THUDM/chatglm3-tiny") == found
        assert load_tokenizer("THUDM/chatglm3-tiny").chat_format == "chatglm3"
        model = load_model("THUDM/chatglm3-tiny")
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(model(ids).logits, load_model(str(base))(ids).logits)
        assert model.config.name_or_path == "THUDM/chatglm3-tiny"
    assert len(server.paths) == asked


def test_revisions_are_pinned(server, hub):
    hub(server.url)
    found = find_base("THUDM/chatglm3-tiny", revision="v1")
    assert "pytorch_model.bin" in files(found) and "model.safetensors" not in files(found)
    with pytest.raises(FileNotFoundError, match=r"THUDM/chatglm3-tiny .*'v2'.*Hugging Face hub"):
        find_base("THUDM/chatglm3-tiny", revision="v2")


def test_unknown_names(server, hub):
    hub(server.url)
    with pytest.raises(FileNotFoundError, match=r"THUDM/chatglm9.*Hugging Face hub"):
        find_base("THUDM/chatglm9")


WHERE_TO = "ZhipuAI/chatglm3-6b .*revision v1.0.*copy the folder .*path"


@pytest.mark.parametrize(("offline", "named"), [(True, r" \(HF_HUB_OFFLINE is set\)"), (False, "")])
def test_offline_says_where_to_put_the_folder(hub, offline, named):
    hub(UNREACHABLE, offline)
    with pytest.raises(ConnectionError, match=f"Face hub{named} .*reached.*cache .*{WHERE_TO}"):
        find_base("ZhipuAI/chatglm3-6b", revision="v1.0")


def test_modelscope_offline(tmp_path, monkeypatch):
    pytest.importorskip("modelscope")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=f"ModelScope .*reached.*cache .*{WHERE_TO}"):
        find_base("ZhipuAI/chatglm3-6b", hub="modelscope", revision="v1.0")


def test_modelscope_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ImportError, match=r"hub .*pip install modelscope"):
        find_base("ZhipuAI/chatglm3-6b", hub="modelscope")


def test_folders(base, tmp_path):
    assert find_base(str(base)) == base
    with pytest.raises(ValueError, match=r"revision 'v1'.*is a folder"):
        find_base(str(base), revision="v1")
    with pytest.raises(ValueError, match=r"hub .*huggingface or modelscope.*'github'"):
        find_base("THUDM/chatglm3-6b", hub="github")
    with pytest.raises(FileNotFoundError, match=r"not a base.*no config\.json"):
        find_base(str(tmp_path))
    for missing in (str(tmp_path / "x"), "./x", "x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"No base .*GLM-4-9B.*hub name .*THUDM/chatglm3-6b"):
            find_base(missing)


@pytest.mark.parametrize("command", ["train", "evaluate", "chat"])
def test_every_command_has_the_flags(command, hub, capsys):
    hub(UNREACHABLE, offline=True)
    flags = ["--model_name_or_path", "THUDM/chatglm3-6b", "--model_revision", "abc"]
    if command == "train":
        flags += ["--do_train", "--train_file", "rows.json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *flags])
    assert stopped.value.code == 1
    assert "its cache does not have THUDM/chatglm3-6b at revision abc" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--hub", "github"])
    assert stopped.value.code == 2
    assert "--hub must be one of huggingface, modelscope, got 'github'" in capsys.readouterr().err
