"""Prefixes in the format for vLLM: written, read back, and refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from chatglm_ptuning.prefix.checkpoint import PrefixCheckpoint
from chatglm_ptuning.prefix.formats import detect_format, kit, read_prefix, vllm
from chatglm_ptuning.prefix.rotation import rotate_keys


@pytest.fixture
def shape(tiny_config):
    return tiny_config(rope_ratio=50.0).prefix_shape


@pytest.fixture
def checkpoint(prefix_folders, shape) -> PrefixCheckpoint:
    """The prefix "b", of 5 virtual tokens."""
    return kit.read(prefix_folders["b"], shape)


def test_a_prefix_comes_back(checkpoint, shape, tmp_path):
    path = vllm.write(tmp_path / "ads", checkpoint, shape)
    assert path == tmp_path / "ads" / "ads.vllm.safetensors"
    for place in (path, path.parent):
        assert detect_format(place) == ("vLLM", place)
        found = read_prefix(place, shape)
        torch.testing.assert_close(found.parameters, checkpoint.parameters, rtol=0, atol=2e-6)
        assert replace(found.metadata, kit_version=None) == replace(checkpoint.metadata, kit_version=None)


def test_keys_are_rotated_to_the_places_before_the_text(checkpoint, shape, tmp_path):
    """RoPE is relative: a query at position P sees a rotated key as one at 0 sees the key itself."""
    key_values = load_file(vllm.write(tmp_path, checkpoint, shape, "a"))["key_values"]
    assert key_values.shape == (2, 2, 5, 2, 8)
    table = checkpoint.parameters["embedding.weight"].view(5, *shape.per_token)
    torch.testing.assert_close(key_values[:, 1].transpose(0, 1), table[:, 1::2], rtol=0, atol=0)
    query = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    for place in range(3):
        ours = (rotate_keys(query, place, shape)[:, 0::2] * table[:, 0::2]).sum(-1)
        theirs = (rotate_keys(query, place + 5, shape)[:, 0::2] * key_values[:, 0].transpose(0, 1)).sum(-1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_hash_is_of_the_content(checkpoint, shape, tmp_path):
    def fields(path):
        with safe_open(path, "pt") as file:
            return file.metadata()

    one, same = (fields(vllm.write(tmp_path, checkpoint, shape, name)) for name in ("one", "same"))
    assert one["content_sha256"] == same["content_sha256"]
    assert (one["name"], one["length"], one["ptuning_vllm"]) == ("one", "5", "1")
    other = replace(checkpoint, parameters={"embedding.weight": checkpoint.parameters["embedding.weight"] + 1e-3})
    assert fields(vllm.write(tmp_path, other, shape, "other"))["content_sha256"] != one["content_sha256"]


def test_several_in_a_folder(checkpoint, shape, tmp_path):
    for name in ("one", "two"):
        vllm.write(tmp_path, checkpoint, shape, name)
    with pytest.raises(ValueError, match=r"one\.vllm\.safetensors, two\.vllm\.safetensors.*name one"):
        read_prefix(tmp_path, shape)


def test_what_vllm_cannot_serve_is_refused(checkpoint, shape, tmp_path, tiny_config):
    headed = replace(checkpoint, heads={"classifier.weight": torch.ones(2, 32)})
    mixed = replace(
        headed,
        metadata=replace(checkpoint.metadata, tasks={"labels": {"head": "x"}, "texts": {"head": "generation"}}),
        heads={"heads.labels.weight": torch.ones(2, 32)},
    )
    untrained = replace(checkpoint, metadata=replace(checkpoint.metadata, trained=False))
    scaled = tiny_config(rope_ratio=16.0, position_interpolation=True).prefix_shape
    for refused, its_shape, named in (
        (headed, shape, "linear head.*--head generation"),
        (untrained, shape, "untrained"),
        (checkpoint, scaled, "divides the positions by 16.*own engine"),
    ):
        with pytest.raises(ValueError, match=named):
            vllm.write(tmp_path, refused, its_shape, "a")
    assert list(tmp_path.iterdir()) == []
    vllm.write(tmp_path, mixed, shape, "a")  # one of its tasks is generated


def test_a_prefix_with_a_projection_is_folded_first(prefix_folders, shape, tmp_path):
    with pytest.raises(ValueError, match="folded"):
        vllm.write(tmp_path, kit.read(prefix_folders["projected"], shape), shape)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors, fields: tensors["key_values"].add_(1), "damaged.*hash"),
        (lambda tensors, fields: fields.update(ptuning_vllm="9"), "version '9'.*export --to vllm"),
        (lambda tensors, fields: fields.update(prefix="{}"), "do not describe a prefix"),
        (lambda tensors, fields: tensors.update(key_values=torch.ones(2)), "key_values of size"),
    ],
)
def test_faults_name_the_file(checkpoint, shape, tmp_path, change, named):
    path = vllm.write(tmp_path, checkpoint, shape, "a")
    with safe_open(path, "pt") as file:
        fields = file.metadata()
    tensors = load_file(path)
    change(tensors, fields)
    save_file(tensors, path, metadata=fields)
    with pytest.raises(ValueError, match=rf"{path}.*{named}"):
        read_prefix(path, shape)


def test_another_base_is_refused(checkpoint, shape, tmp_path, tiny_config):
    path = vllm.write(tmp_path, checkpoint, shape, "a")
    with pytest.raises(ValueError, match="does not fit this base"):
        read_prefix(path, tiny_config(num_layers=3).prefix_shape)
