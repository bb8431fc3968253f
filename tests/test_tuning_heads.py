"""Every tuning method under the linear heads: trained by the Trainer, saved, restored onto the base."""

import json

import pytest
import torch
from peft import PeftModel

from chatglm_ptuning import (
    ChatGLMForQuestionAnswering,
    ChatGLMForSequenceClassification,
    ChatGLMForTokenClassification,
)
from chatglm_ptuning.training.arguments import PrefixTrainingArguments
from chatglm_ptuning.training.trainer import PrefixTrainer
from chatglm_ptuning.tuning.load import load_tuned, prepare_tuning
from chatglm_ptuning.tuning.methods import PromptSettings

LABELS = {
    ChatGLMForSequenceClassification: lambda ids: {"labels": ids[:, 0] % 4},
    ChatGLMForTokenClassification: lambda ids: {"labels": ids % 4},
    ChatGLMForQuestionAnswering: lambda ids: {"start_positions": ids[:, 0] % 3, "end_positions": ids[:, 0] % 7},
}
HEADS = {ChatGLMForQuestionAnswering: "qa_outputs"}


def load(base, cls, seed=0, **arguments):
    torch.manual_seed(seed)
    return cls.from_pretrained(base, num_labels=4, **arguments)


def train(model, method, batch, folder, **arguments):
    torch.manual_seed(1)
    tuning = prepare_tuning(model, method, prompt=PromptSettings(3))
    args = PrefixTrainingArguments(
        output_dir=str(folder), tuning=method, max_steps=2, report_to=[], disable_tqdm=True, save_strategy="no",
        train_sampling_strategy="sequential", per_device_train_batch_size=6, use_cpu=True, **arguments,
    )  # fmt: skip
    rows = [{name: value[place] for name, value in batch.items()} for place in range(len(batch["input_ids"]))]
    trainer = PrefixTrainer(
        model=model, args=args, tuning=tuning, train_dataset=rows, details={"task": "t"},
        data_collator=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def outputs(model, batch):
    with torch.no_grad():
        output = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"])
    return torch.stack((output.start_logits, output.end_logits)) if "start_logits" in output else output.logits


@pytest.fixture
def batch_of(ids):
    def make(cls):
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return {"input_ids": ids, "attention_mask": mask} | LABELS[cls](ids)

    return make


@pytest.mark.parametrize("cls", list(LABELS))
@pytest.mark.parametrize("method", ["ptuning_v2", "prompt", "lora", "full", "head_only"])
def test_what_was_trained_with_a_head_is_restored(tiny_base, tmp_path, batch_of, cls, method):
    batch, head = batch_of(cls), HEADS.get(cls, "classifier_head")
    model = load(tiny_base, cls, **({"pre_seq_len": 3} if method == "ptuning_v2" else {}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(model, method, batch, tmp_path, learning_rate=1e-2)
    changed = {name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])}
    body = {name for name in before if name.startswith("transformer.") and "output_layer" not in name}
    of_head = set() if method == "lora" else {f"{head}.weight", f"{head}.bias"}  # PEFT renames a head that it trains
    of_base = {"full": body, "ptuning_v2": {"transformer.prefix_encoder.embedding.weight"}}.get(method, set())
    assert changed == of_head | of_base
    assert not trainer.tuning.model.transformer.output_layer.weight.requires_grad
    expected = outputs(model, batch)
    restored = load_tuned(load(tiny_base, cls, seed=9), tmp_path)
    torch.testing.assert_close(outputs(restored.model, batch), expected, rtol=1e-4, atol=1e-4)
    if method == "lora":
        theirs = PeftModel.from_pretrained(load(tiny_base, cls, seed=9), tmp_path)
        torch.testing.assert_close(outputs(theirs, batch), expected, rtol=1e-4, atol=1e-4)
    if method in ("lora", "head_only"):
        with pytest.raises(ValueError, match=r"size|holds a head"):
            load_tuned(cls.from_pretrained(tiny_base, num_labels=3) if head != "qa_outputs" else
                       load(tiny_base, ChatGLMForTokenClassification), tmp_path)  # fmt: skip


@pytest.mark.parametrize("method", ["prompt", "lora", "full", "head_only"])
def test_training_resumes_from_a_checkpoint_with_its_head(tiny_base, tmp_path, batch_of, method):
    cls = ChatGLMForSequenceClassification
    batch = batch_of(cls)
    model = load(tiny_base, cls)
    train(model, method, batch, tmp_path)
    torch.manual_seed(8)
    further = prepare_tuning(load(tiny_base, cls, seed=9), method, prompt=PromptSettings(3))
    further.load(tmp_path)
    torch.testing.assert_close(outputs(further.model, batch), outputs(model, batch), rtol=1e-4, atol=1e-4)
    trained = [value for value in further.model.parameters() if value.requires_grad]
    assert sum(value.numel() for value in trained) == sum(
        value.numel() for value in model.parameters() if value.requires_grad
    )


def test_the_head_has_a_learning_rate_of_its_own(tiny_base, tmp_path, batch_of):
    cls = ChatGLMForSequenceClassification
    rates = {"learning_rate": 1e-3, "head_learning_rate": 5e-2, "lr_scheduler_type": "constant"}
    for method in ("ptuning_v2", "lora", "full"):
        model = load(tiny_base, cls, **({"pre_seq_len": 3} if method == "ptuning_v2" else {}))
        trainer = train(model, method, batch_of(cls), tmp_path / method, **rates)
        names = {id(value): name for name, value in model.named_parameters()}
        of = {names[id(value)]: group["lr"] for group in trainer.optimizer.param_groups for value in group["params"]}
        assert {name: rate for name, rate in of.items() if rate == 5e-2}.keys() == {
            name for name, value in model.named_parameters() if "classifier_head" in name and value.requires_grad
        }
        assert {rate for name, rate in of.items() if "classifier_head" not in name} == {1e-3}
        assert json.loads((tmp_path / method / "training_arguments.json").read_text())["head_learning_rate"] == 5e-2


def test_a_head_that_lora_trains_is_not_taken_for_a_random_one(tiny_base):
    model = load(tiny_base, ChatGLMForSequenceClassification)
    prepare_tuning(model, "lora")
    with pytest.raises(ValueError, match="untrained"):
        model.check_prefix_is_trained()
    with torch.no_grad():
        model.classifier_head.modules_to_save["default"].weight.add_(1.0)
    model.check_prefix_is_trained()


def test_without_its_matrices_lora_keeps_the_trained_head(tiny_base, tmp_path, batch_of):
    batch = batch_of(ChatGLMForSequenceClassification)
    model = load(tiny_base, ChatGLMForSequenceClassification)
    tuning = train(model, "lora", batch, tmp_path, learning_rate=1e-1).tuning
    head = model.classifier_head.modules_to_save["default"]
    plain = load(tiny_base, ChatGLMForSequenceClassification)
    with torch.no_grad():
        plain.classifier_head.weight.copy_(head.weight)
        plain.classifier_head.bias.copy_(head.bias)
    tuned = outputs(model, batch)
    with tuning.plain_base():
        torch.testing.assert_close(outputs(model, batch), outputs(plain, batch))
    assert not torch.allclose(tuned, outputs(plain, batch))
    torch.testing.assert_close(outputs(model, batch), tuned)
