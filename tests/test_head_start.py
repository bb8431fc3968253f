"""First values of a linear head, against scikit-learn's own predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from chatglm_ptuning import ChatGLMForSequenceClassification, ChatGLMForTokenClassification
from chatglm_ptuning.cli import main
from chatglm_ptuning.data.collate import PaddingCollator
from chatglm_ptuning.training import head_start
from chatglm_ptuning.training.head_start import probe_head

NANO = Path(__file__).parents[1] / "data" / "chatglm-nano"
SIZES = {"batch_size": 7, "seed": 1}
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


@pytest.fixture
def make(tiny_base):
    def load(cls=ChatGLMForSequenceClassification, **arguments):
        torch.manual_seed(5)
        return cls.from_pretrained(tiny_base, pre_seq_len=3, **arguments)

    return load


def rows_of(count, label):
    """Rows of different lengths, with labels by their ids."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for place in range(count):
        ids = torch.randint(5, 60, (3 + place % 4,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": label(ids)})
    return rows


def states_of(model, rows):
    """What the transformer gives for each row alone, `[seq_len, hidden_size]`."""
    with torch.no_grad():
        return [model.transformer(torch.tensor([row["input_ids"]])).last_hidden_state[0].numpy() for row in rows]


def is_a_regression_of_sklearn(logits, states, labels):
    """Whether the probabilities are those of scikit-learn at one of the strengths to choose from."""
    ours = torch.from_numpy(np.asarray(logits)).softmax(-1).numpy()
    for strength in STRENGTHS:
        theirs = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200)).fit(states, labels)
        if np.allclose(theirs.predict_proba(states), ours[:, theirs[-1].classes_], atol=0.02):
            return True
    return False


def test_a_head_for_texts_is_the_logistic_regression_on_its_inputs(make):
    model = make(num_labels=3).train()
    rows = rows_of(80, lambda ids: ids[-1] % 3)
    assert probe_head(model, model.classifier_head, rows, PaddingCollator(0), **SIZES) == 80
    assert model.training and not model.classifier_head.is_untrained
    states = np.stack([states[-1] for states in states_of(model.eval(), rows)])
    with torch.no_grad():
        logits = model.classifier_head(torch.from_numpy(states))
    assert is_a_regression_of_sklearn(logits, states, [row["labels"] for row in rows])


def test_a_head_for_tokens_learns_from_those_with_a_label(make):
    model = make(ChatGLMForTokenClassification, num_labels=3)
    rows = rows_of(40, lambda ids: [-100] + [token % 3 for token in ids[1:]])
    count = probe_head(model, model.classifier_head, rows, PaddingCollator(0), **SIZES)
    assert count == sum(len(row["labels"]) - 1 for row in rows)
    states = np.concatenate([states[1:] for states in states_of(model.eval(), rows)])
    with torch.no_grad():
        logits = model.classifier_head(torch.from_numpy(states))
    assert is_a_regression_of_sklearn(logits, states, np.concatenate([row["labels"][1:] for row in rows]))


def test_classes_without_rows_are_never_the_answer(make):
    model = make(num_labels=5)
    rows = rows_of(60, lambda ids: 1 if ids[-1] % 2 else 3)
    probe_head(model, model.classifier_head, rows, PaddingCollator(0), **SIZES)
    states = torch.from_numpy(np.stack([states[-1] for states in states_of(model.eval(), rows)]))
    logits = model.classifier_head(states)
    assert (logits[:, [0, 2, 4]].amax(-1) < logits[:, [1, 3]].amin(-1)).all()


def test_several_labels_at_once_are_a_regression_each(make):
    model = make(num_labels=3, problem_type="multi_label_classification")
    rows = rows_of(80, lambda ids: [float(ids[-1] % 2), float(ids[0] > 30), 0.0])
    probe_head(model, model.classifier_head, rows, PaddingCollator(0), **SIZES)
    states = np.stack([states[-1] for states in states_of(model.eval(), rows)])
    with torch.no_grad():
        logits = model.classifier_head(torch.from_numpy(states))
    labels = np.array([row["labels"] for row in rows])
    for place in range(2):
        two = torch.stack((torch.zeros(80), logits[:, place]), -1)
        assert is_a_regression_of_sklearn(two, states, labels[:, place].astype(int))
    assert logits[:, 2].unique().numel() == 1 and logits[0, 2] < -4, "a label that no row has"


def test_large_fits_are_to_fewer_states_and_small_ones_to_all(make, monkeypatch):
    fits = []
    fit = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", lambda self, *rows: fits.append(len(rows[0])) or fit(self, *rows))
    rows = rows_of(80, lambda ids: ids[-1] % 3)

    def fitted():
        fits.clear()
        model = make(num_labels=3)
        count = probe_head(model, model.classifier_head, rows, PaddingCollator(0), **SIZES)
        return count, fits, model.classifier_head.weight.numel()

    count, sizes, products = fitted()
    assert (count, sizes) == (80, [64] * 4 + [80])
    monkeypatch.setattr(head_start, "_CHOICE_STATES", 50)
    monkeypatch.setattr(head_start, "_CHEAP_PRODUCTS", 79 * products)
    assert fitted()[:2] == (80, [40] * 4 + [80])
    monkeypatch.setattr(head_start, "MAX_PRODUCTS", 60 * products)
    assert fitted()[:2] == (60, [48] * 4 + [60])


def test_a_single_class_leaves_the_head_as_it_is(make):
    model = make(num_labels=3)
    before = model.classifier_head.weight.clone()
    assert probe_head(model, model.classifier_head, rows_of(8, lambda ids: 1), PaddingCollator(0), **SIZES) == 0
    assert model.classifier_head.is_untrained and model.classifier_head.weight.equal(before)


@pytest.mark.parametrize("tuning", ["ptuning_v2", "lora", "prompt", "full"])
def test_a_run_starts_from_it_however_it_is_tuned(tmp_path, capsys, tuning):
    losses = {}
    for init in ("probe", "random"):
        output = tmp_path / init
        main(["train", "--task", "news_topic", "--task_data", str(NANO.parent), "--model_name_or_path", str(NANO),
              "--head", "sequence_classification", "--do_train", "--tuning", tuning, "--pre_seq_len", "4",
              "--learning_rate", "1e-6", "--max_train_samples", "60", "--max_steps", "2", "--logging_steps", "1",
              "--head_init", init, "--report_drift", "false", "--output_dir", str(output)])  # fmt: skip
        assert ("starts from a logistic regression on 60 states" in capsys.readouterr().out) == (init == "probe")
        losses[init] = json.loads((output / "trainer_state.json").read_text())["log_history"][0]["loss"]
    assert losses["probe"] < 0.8 * losses["random"]


def test_another_start_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--do_train", "--head_init", "zeros", "--output_dir", str(tmp_path)])
    assert "--head_init must be one of probe, random, got 'zeros'" in capsys.readouterr().err
