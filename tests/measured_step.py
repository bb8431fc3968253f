"""Peak memory of a real training step, for comparison with the estimate; run as a program it prints its own."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import chatglm_ptuning  # noqa: F401  registers the classes
from chatglm_ptuning.data.collate import PackingCollator, pack
from chatglm_ptuning.estimation.memory import with_prefix
from chatglm_ptuning.model.configuration_chatglm import ChatGLMConfig


def make_step(model, config, batch, length):
    """A model with AdamW's states and the gradients of a batch before, and a function that runs one more batch."""
    ids = torch.randint(3, config.padded_vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    (packed,) = pack(PackingCollator()(rows)["rows"], batch * length)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)

    def step():
        model(**packed, skip_logits=True).loss.backward()

    step()
    optimizer.step()
    return step


def allocated_peak(model, config, batch, length):
    """Bytes of a step beside what stands before it, as torch's own allocator reports them."""
    step = make_step(model, config, batch, length)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def own_peak():
    """This process's peak resident memory in bytes. Linux's getrusage also counts the parent's, from before exec."""
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_peak(settings):
    """Growth of this process's peak memory by a model and its steps, in bytes."""
    config = with_prefix(ChatGLMConfig(**settings["config"]), settings["pre_seq_len"])
    before = own_peak()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=settings["attn_implementation"]
        )
    model.to_empty(device="cpu").train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)  # makes the memory real
    if settings["gradient_checkpointing"]:
        model.gradient_checkpointing_enable()
    step = make_step(model, config, settings["batch"], settings["length"])
    step()
    return own_peak() - before


if __name__ == "__main__":
    print(resident_peak(json.loads(sys.argv[1])))
