"""Measures what a distilled prefix keeps of the use of a document in the context; draws the picture of docs/distill.md.

    python scripts/measure_distillation.py --output output/distillation
    python scripts/measure_distillation.py --output output/distillation --picture docs/images/distillation.png

Every document of `data/documents` has held-out questions with answers and held-out continuations beside it, which no
training sees. The loss on them is measured for the base alone, with the document in the context, and with prefixes of
several lengths: first values without training, distilled, and trained by ordinary next-token loss on the document. A
finished measurement is kept in `OUTPUT/results.json` and not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from chatglm_ptuning.chat.message import Conversation, Message
from chatglm_ptuning.cli import main as command
from chatglm_ptuning.figures import drawing
from chatglm_ptuning.files import write_json, write_lines
from chatglm_ptuning.model.arguments import DEFAULT_MODEL
from chatglm_ptuning.model.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.model.tokenization_chatglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("questions", "continuations")
STUDY = ["--own_questions", 0, "--rounds", 8, "--max_row_length", 80, "--learning_rate", 0.3]
"""Settings of `distill` that suit chatglm-nano, which writes poor questions itself."""
METHODS = {"first values": "tab:gray", "next token": "tab:orange", "distilled": "tab:blue"}


def measure(
    model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, pairs: Sequence[Sequence[str]], prefix: str
) -> tuple[float, int]:
    """The summed loss of held-out answers under a loaded prefix ("" for the base), in nats, and their tokens."""
    total, count = 0.0, 0
    for question, answer in pairs:
        conversation = Conversation([Message("user", question), Message("assistant", answer)])
        encoded = tokenizer.chat.encode(conversation)
        ids = torch.tensor([encoded.input_ids])
        labels = ids.clone()
        labels[:, : encoded.answer_start] = -100
        supervised = len(encoded.input_ids) - encoded.answer_start
        batch = model.prefix_batch(prefix or None)
        with torch.no_grad():
            total += model(ids, labels=labels, prefix=batch).loss.item() * supervised
        count += supervised
    return total, count


def train(method: str, document: Path, length: int, steps: int, folder: Path) -> None:
    """Trains a prefix on a document."""
    common = ["--pre_seq_len", length, "--output_dir", folder, "--disable_tqdm", "true", "--save_strategy", "no",
              "--prefix_dropout", 0.0, "--max_steps", steps, "--seed", 1]  # fmt: skip
    if method == "distilled":
        command([str(word) for word in ["distill", "--document", document, *STUDY, *common]])
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = document.read_text("utf-8")
    write_lines(folder / "document.jsonl", [{"text": text}])
    flags = ["train", "--do_train", "--train_file", folder / "document.jsonl", "--init_prefix_text", text,
             "--max_source_length", 512, "--max_target_length", 512, "--learning_rate", 1e-1,
             "--per_device_train_batch_size", 1, "--report_drift", "false", *common]  # fmt: skip
    command([str(word) for word in flags])


def draw(results: dict[str, dict[str, list[float]]], documents: dict[str, int], lengths: list[int], path: Path) -> None:
    """Draws the share of the context's gain that each prefix keeps, over its length."""
    with drawing(path, 9, 4, columns=2) as axes:
        for axis, kind in zip(axes, KINDS, strict=True):
            for method, color in METHODS.items():
                points = [(length, gain(results, documents, kind, f"{method} {length}")) for length in lengths]
                points = [point for point in points if point[1] is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=color, label=method)
            twentieth = sum(documents.values()) / len(documents) / 20
            axis.axvline(twentieth, color="tab:green", linestyle=":", label="1/20 of the document")
            axis.axhline(100, color="black", linewidth=0.8, label="document in the context")
            axis.set(xscale="log", xlabel="virtual tokens", title=f"held-out {kind}", ylabel="% of the context's gain")
            axis.set_ylim(-20, 110)
            axis.set_xticks(lengths, [str(length) for length in lengths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small")


def gain(results: dict[str, dict[str, list[float]]], documents: dict[str, int], kind: str, what: str) -> float | None:
    """Percent of the loss that the context saves, over all documents."""
    if any(what not in results.get(name, {}) for name in documents):
        return None
    base, context, own = (
        sum(results[name][wanted][kind][0] for name in documents) for wanted in ("base", "context", what)
    )
    return 100 * (base - own) / (base - context)


def table(results: dict[str, dict[str, list[float]]], documents: dict[str, int]) -> str:
    """The losses in nats per token over all documents, and the shares, as Markdown."""
    lines = [
        "| | questions | continuations | gain, questions, % | gain, continuations, % |",
        "|---|---:|---:|---:|---:|",
    ]
    for what in sorted(results[next(iter(documents))], key=lambda name: (name.rpartition(" ")[0], len(name), name)):
        if any(what not in results[name] for name in documents):
            continue
        cells = []
        for kind in KINDS:
            sums = [results[name][what][kind] for name in documents]
            cells.append(f"{sum(total for total, _ in sums) / sum(count for _, count in sums):.3f}")
        cells += [f"{gain(results, documents, kind, what):.0f}" for kind in KINDS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is missing, then prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model_name_or_path", default=DEFAULT_MODEL)
    parser.add_argument("--documents", type=Path, default=ROOT / "data" / "documents")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=150, help="of a distillation")
    parser.add_argument("--next_token_steps", type=int, default=50)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.json"
    results = json.loads(file.read_text("utf-8")) if file.exists() else {}
    tokenizer = ChatGLMTokenizer.from_pretrained(args.model_name_or_path)
    model = ChatGLMForConditionalGeneration.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    documents = {}
    for path in sorted(args.documents.glob("*.txt")):
        held_out = json.loads(path.with_suffix(".json").read_text("utf-8"))
        ids = tokenizer.chat.start_ids + tokenizer.encode(path.read_text("utf-8").strip(), add_special_tokens=False)
        documents[path.stem] = len(ids)
        own = results.setdefault(path.stem, {})

        def keep(what: str, prefix: str, name=path.stem, own=own, held_out=held_out) -> None:
            own[what] = {kind: measure(model, tokenizer, held_out[kind], prefix) for kind in KINDS}
            write_json(file, results)
            print(name, what, own[what], flush=True)

        if "base" not in own:
            keep("base", "")
            model.prefix_of_ids(torch.tensor(ids), "measured")
            keep("context", "measured")
        for length in args.lengths:
            for method in args.methods:
                what = f"{method} {length}"
                if what in own:
                    continue
                if method == "first values":
                    model.prefix_of_ids(torch.tensor(ids[:length]), "measured")
                else:
                    folder = args.output / path.stem / what.replace(" ", "-")
                    train(method, path, length, args.steps if method == "distilled" else args.next_token_steps, folder)
                    model.load_prefix(folder, "measured")
                keep(what, "measured")
    for length in args.lengths:
        folders = [args.output / name / f"distilled-{length}" for name in documents]
        what = f"all documents together {length}"
        if len(folders) < 2 or what in results[folders[-1].parent.name] or not all(map(Path.exists, folders)):
            continue
        for place, folder in enumerate(folders):
            model.load_prefix(folder, f"p{place}")
        for name in documents:
            held_out = json.loads((args.documents / f"{name}.json").read_text("utf-8"))
            joint = "+".join(f"p{place}" for place in range(len(folders)))
            results[name][what] = {kind: measure(model, tokenizer, held_out[kind], joint) for kind in KINDS}
        write_json(file, results)
    print(table(results, documents))
    if args.picture:
        draw(results, documents, args.lengths, args.picture)


if __name__ == "__main__":
    main()
