"""Answer the questions of a data set and count exact matches.

    python -m scripts.evaluate MODEL --data data/test.parquet

An answer matches if it equals the reference after trimming, case folding and dropping a closing full stop. Where the
data has a column `options`, they are also ranked: right if the reference is the one of them that the model finds the
likeliest answer, which is how benchmarks of several choices are usually scored, and what a blind guess of one in four
compares with. Every share comes with its count and a 95 % confidence interval (Wilson 1927), per task and language.
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
    model_type = MiniVLMConfig.get_config_dict(path)[0].get("model_type")
    if model_type != "minivlm":
        raise ValueError(
            f"{path} is of type {model_type!r}, not a MiniVLM. Make one of it, and of what it lacks, by "
            "python -m scripts.convert."
        )
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
        words, options = "".join(part["text"] for part in answer["content"]), row.get("options")
        if options and words not in options:
            raise ValueError(f"{rows.where(index)}: the answer {words!r} is none of its options {options}. Add it.")
        prepared.append(
            {
                "row": index,
                "question": "".join(part.get("text", "") for part in question[-1]["content"]).strip(),
                "text": processor.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
                "images": sample["images"],
                "answer": words,
                "task": row.get("task", "all"),
                "language": row.get("language", "all"),
                "options": options,
            }
        )
    return prepared


def encode(processor: ProcessorMixin, items: list[dict], texts: list[str], side: str, device) -> dict:
    """Model inputs of `texts` about the pictures of `items`, padded on `side`."""
    images = [decode_image(image) for item in items for image in item["images"]]
    return processor(
        text=texts, images=images or None, return_tensors="pt", padding=True, padding_side=side,
        add_special_tokens=False,
    ).to(device)  # fmt: skip


@torch.inference_mode()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, items: list[dict], max_new_tokens: int = 64
) -> list[str]:
    """Greedy answers for a batch of `prompts`."""
    inputs = encode(processor, items, [item["text"] for item in items], "left", model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.inference_mode()
def option_scores(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[list[float]]:
    """Log-probability of each of an item's `options` as the whole answer: the sum over its tokens and the end."""
    pairs = [(item, option + processor.tokenizer.eos_token) for item in items for option in item["options"]]
    texts = [item["text"] + option for item, option in pairs]
    inputs = encode(processor, [item for item, _ in pairs], texts, "right", model.device)
    ids, ends = inputs["input_ids"], inputs["attention_mask"].sum(1)
    lengths = ends.new_tensor([len(processor.tokenizer(option)["input_ids"]) for _, option in pairs])
    place = torch.arange(ids.shape[1], device=ids.device)
    spoken = (place >= (ends - lengths)[:, None]) & (place < ends[:, None])  # (B, T): the option's own tokens
    asked = torch.nn.functional.pad(spoken[:, 1:], (0, 1))  # the positions that predict them
    logits = model(**inputs, logits_to_keep=asked).logits[0].float()  # (K, V)
    scores = logits.log_softmax(-1).gather(1, ids[spoken][:, None])[:, 0]
    sums = iter(part.sum().item() for part in scores.split(lengths.tolist()))
    return [[next(sums) for _ in item["options"]] for item in items]


def rank(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[str]:
    """The likeliest of each item's `options`."""
    scores = option_scores(model, processor, items)
    return [max(zip(values, item["options"]))[1] for values, item in zip(scores, items)]


def evaluate(model, processor, rows: Rows, limit: int | None = None, batch_size: int = 64) -> dict:
    """Loss and exact match of the first `limit` rows, and how often the likeliest of a row's options is the right one.

    Returns:
        what `summarise` does.
    """
    return summarise(judge(model, processor, rows.select(range(min(limit or len(rows), len(rows)))), batch_size))


def judge(model, processor, rows: Rows, batch_size: int = 64, quiet: bool = False) -> list[dict]:
    """One result per row: `row`, `task`, `language`, `question`, `answer`, `output`, `right`; `nll`, the negative
    log-likelihood of the reference, and its `tokens`; with options also `ranked`, the likeliest of them."""
    was_training = model.training
    model.eval()
    items = prompts(rows, processor)
    by_length = sorted(range(len(items)), key=lambda i: (items[i]["task"] in GENERATIVE, len(items[i]["text"])))

    def batched(method, chosen: list[int], size: int, doing: str) -> dict[int, object]:
        results = {}
        for start in tqdm(range(0, len(chosen), size), desc=doing, unit="batch", disable=quiet or not chosen):
            batch = chosen[start : start + size]
            try:
                results |= zip(batch, method(model, processor, [items[i] for i in batch]))
            except BadRow as error:
                raise ValueError(
                    f"Rows {batch} hold a bad one: {error}. Evaluation counts every row, so mend it."
                ) from error
        return results

    outputs = batched(answer, by_length, batch_size, "answering")
    losses = batched(answer_loss, by_length, batch_size, "reading answers")
    ranked = batched(rank, [i for i in by_length if items[i]["options"]], max(1, batch_size // 4), "ranking options")
    model.train(was_training)
    results = []
    for i, item in enumerate(items):
        result = {key: item[key] for key in ("row", "task", "language", "question", "answer")}
        result |= {"output": outputs[i], "right": normalise(outputs[i]) == normalise(item["answer"])}
        result |= {"nll": losses[i][0], "tokens": losses[i][1]}
        results.append(result | ({"ranked": ranked[i]} if i in ranked else {}))
    return results


def answer_loss(model: PreTrainedModel, processor: ProcessorMixin, items: list[dict]) -> list[tuple[float, int]]:
    """Negative log-likelihood (nats) and number of tokens of each item's reference answer, its end included."""
    # A reference that spells the image token means no picture; the model could not write it, either.
    answers = [item["answer"].replace(processor.image_token, "") for item in items]
    scores = option_scores(model, processor, [item | {"options": [a]} for item, a in zip(items, answers)])
    end = processor.tokenizer.eos_token
    return [(-s[0], len(processor.tokenizer(a + end)["input_ids"])) for s, a in zip(scores, answers)]


def summarise(results: list[dict]) -> dict:
    """Figures of all results, whichever process judged them.

    Returns:
        `{"scores": {"loss", "match", "ranked"}, "overall": cell, "tasks": {task: {language: cell}}, "ranked":
        likewise, "answers": [...]}`. A cell holds `match` (share), `hits`, `count`, `low` and `high`. `loss` is per
        answer token, in nats; `match` and `overall` are of exact matches and leave captions out; `ranked` is the share
        of options that are ranked right. `answers` holds each row's texts.
    """
    ranked = [result | {"right": result["ranked"] == result["answer"]} for result in results if "ranked" in result]
    overall = cell([result["right"] for result in results if result["task"] not in GENERATIVE])
    scores = {"loss": round(sum(r["nll"] for r in results) / max(1, sum(r["tokens"] for r in results)), 4)}
    scores["match"] = overall["match"]
    if ranked:
        scores["ranked"] = cell([result["right"] for result in ranked])["match"]
    kept = ("row", "answer", "output", "ranked")
    return {
        "scores": scores,
        "overall": overall,
        "tasks": by_task(results),
        "ranked": by_task(ranked),
        "answers": [{key: result[key] for key in kept if key in result} for result in results],
    }


def by_task(results: list[dict]) -> dict[str, dict[str, dict]]:
    """`{task: {language: cell}}` of the results."""
    groups = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda r: (r["task"], r["language"])):
        groups[result["task"]][result["language"]].append(result["right"])
    return {task: {language: cell(r) for language, r in languages.items()} for task, languages in groups.items()}


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
    print(f"loss per answer token: {metrics['scores']['loss']:.4f}")
    if metrics["ranked"]:
        print(f"\n{'task':<12}{'language':<10}{'likeliest':>12}{'95 % interval':>18}{'rows':>8}")
    for task, languages in metrics["ranked"].items():
        for language, c in languages.items():
            print_cell(task, language, c)


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
