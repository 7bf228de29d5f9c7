"""Answer the questions of a data set and count exact matches.

    python -m scripts.evaluate MODEL --data data/test.parquet

An answer matches if it equals the reference after trimming, case folding and dropping a closing full stop. Every share
comes with its count and a 95 % confidence interval (Wilson 1927), per task and language.
"""

import argparse
import hashlib
import json
import math
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from configuration_minivlm import MiniVLMConfig
from data_minivlm import decode_image
from modeling_minivlm import MiniVLMForConditionalGeneration
from processing_minivlm import MiniVLMProcessor
from sources_minivlm import BadRow, Rows, load_rows

GENERATIVE = ("caption",)  # free text: exact match says little, so these stay out of the overall figure


def register_config() -> None:
    """Let transformers' auto classes in this process read our configuration by this checkout's code.

    Never called by the model's own files, or loading them once would trust every later model in silence.
    """
    AutoConfig.register("minivlm", MiniVLMConfig, exist_ok=True)


def load_trained(path: str | Path) -> tuple[MiniVLMForConditionalGeneration, MiniVLMProcessor]:
    """Model and processor of a folder or Hub id, run by this checkout's code and not by the code saved beside them."""
    register_config()
    return MiniVLMForConditionalGeneration.from_pretrained(path), MiniVLMProcessor.from_pretrained(path)


def normalise(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().rstrip(".。").strip().casefold()


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a share."""
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def prompts(rows: Rows, processor: ProcessorMixin) -> list[dict]:
    """Prompt, pictures and reference of each row: everything before its last assistant turn is the question."""
    prepared = []
    for index in range(len(rows)):
        try:
            row, sample = rows[index], rows.adapt(index)
        except BadRow as error:
            raise ValueError(f"{rows.where(index)}: {error}. Evaluation counts every row, so mend it.") from error
        *question, answer = sample["messages"]
        if answer["role"] != "assistant":
            raise ValueError(f"Row {index} does not end with an assistant turn, so there is nothing to compare with.")
        prepared.append(
            {
                "text": processor.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
                "images": sample["images"],
                "answer": "".join(part["text"] for part in answer["content"]),
                "task": row.get("task", "all"),
                "language": row.get("language", "all"),
            }
        )
    return prepared


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[dict], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers for a batch of `prompts`."""
    images = [decode_image(image) for item in items for image in item["images"]]
    inputs = processor(
        text=[item["text"] for item in items],
        images=images or None,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(model, processor, rows: Rows, limit: int | None = None, batch_size: int = 64) -> dict:
    """Exact match of the first `limit` rows.

    Returns:
        `{"overall": cell, "tasks": {task: {language: cell}}, "answers": [...]}` with cells of `match` (share), `hits`,
        `count`, `low` and `high`; `overall` leaves captions out. `answers` holds each row's index and texts.
    """
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    was_training = model.training
    model.eval()
    items = prompts(rows, processor)
    order = sorted(range(len(items)), key=lambda i: (items[i]["task"] in GENERATIVE, len(items[i]["text"])))
    outputs: list[str] = [""] * len(items)
    for start in tqdm(range(0, len(order), batch_size), desc="answering", unit="batch"):
        batch = order[start : start + batch_size]
        try:
            texts = answer(model, processor, [items[i] for i in batch])
        except BadRow as error:
            raise ValueError(
                f"Rows {batch} hold a bad one: {error}. Evaluation counts every row, so mend it."
            ) from error
        for i, text in zip(batch, texts):
            outputs[i] = text
    model.train(was_training)
    hits = defaultdict(list)
    for item, output in zip(items, outputs):
        match = normalise(output) == normalise(item["answer"])
        hits[item["task"], item["language"]].append(match)
        if item["task"] not in GENERATIVE:
            hits["overall"].append(match)
    tasks = defaultdict(dict)
    for task, language in sorted(key for key in hits if key != "overall"):
        tasks[task][language] = cell(hits[task, language])
    answers = [
        {"row": i, "answer": item["answer"], "output": out} for i, (item, out) in enumerate(zip(items, outputs))
    ]
    return {"overall": cell(hits["overall"]), "tasks": dict(tasks), "answers": answers}


def cell(matches: list[bool]) -> dict:
    low, high = wilson(sum(matches), len(matches))
    share = sum(matches) / len(matches) if matches else 0.0
    return {
        "match": round(share, 4),
        "hits": sum(matches),
        "count": len(matches),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def print_table(metrics: dict) -> None:
    print(f"{'task':<12}{'language':<10}{'exact match':>12}{'95 % interval':>18}{'rows':>8}")
    for task, languages in metrics["tasks"].items():
        for language, c in languages.items():
            print_cell(task, language, c)
    print_cell("overall", "", metrics["overall"])


def print_cell(task: str, language: str, c: dict) -> None:
    interval = f"{c['low']:.1%} - {c['high']:.1%}"
    print(f"{task:<12}{language:<10}{c['match']:>12.1%}{interval:>18}{c['count']:>8}")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", default=".", help="Folder of a model. Default: the repository's own.")
    parser.add_argument(
        "--data", nargs="+", default=["data/test.parquet"], help="Files, folders or globs, as for training."
    )
    parser.add_argument("--limit", type=int, help="Answer only the first rows. Default: all.")
    parser.add_argument("--batch_size", type=int, default=64, help="Rows answered at once.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to compute.")
    parser.add_argument("--json", type=Path, help="Also write the metrics to this file.")
    parser.add_argument("--answers", type=Path, help="Also write every reference and answer to this JSON-lines file.")
    args = parser.parse_args(argv)
    rows = load_rows(args.data)
    model, processor = load_trained(args.model)
    metrics = evaluate(model.to(args.device), processor, rows, args.limit, args.batch_size)
    print_table(metrics)
    answers = metrics.pop("answers")
    if args.json:
        weights = Path(args.model) / "model.safetensors"
        source = {"model": args.model, "data": args.data, "limit": args.limit, "device": args.device}
        if weights.is_file():
            source["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        args.json.write_text(json.dumps(source | metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.answers:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in answers]
        args.answers.write_text("".join(lines), encoding="utf-8")
    return metrics


if __name__ == "__main__":
    sys.exit(main() is None)
