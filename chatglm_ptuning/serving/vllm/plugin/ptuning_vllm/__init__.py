"""Modules that vLLM loads. They import torch, safetensors and vLLM, and nothing of this kit."""
