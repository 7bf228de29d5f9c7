"""Turn the metrics of an evaluation into the results of a model card."""

from collections.abc import Iterator

from huggingface_hub import EvalResult

from minivlm.hub.secrets import anonymous


def cells(metrics: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Yield metric, title, part (`name-en`, "" for all) and cell of each share in the metrics of an evaluation."""
    if metrics.get("overall"):
        yield "exact_match", "Exact match", "", metrics["overall"]
    for key, metric, title in (("tasks", "exact_match", "Exact match"), ("ranked", "accuracy", "Likeliest option")):
        for task, languages in metrics.get(key, {}).items():
            for language, cell in languages.items():
                yield metric, title, f"{task}-{language}", cell


def evidence(cell: dict) -> str:
    """Return counts and interval of a share, for a reader."""
    return f"{cell['hits']} of {cell['count']}, 95 % interval {cell['low']:.4f} to {cell['high']:.4f}"


def eval_results(metrics: dict, sources: list[str]) -> list[EvalResult]:
    """Return the model-index: one entry per task and language, and one over all of them."""
    hub = [source.split(":")[1] for source in sources if source.startswith("hub:")]
    data = {"dataset_type": hub[0] if hub else "custom", "dataset_name": anonymous(", ".join(sources)) or "evaluation"}
    return [
        EvalResult(
            "image-text-to-text", metric_type=metric, metric_name=f"{title} ({evidence(cell)})",
            metric_value=cell["match"], dataset_config=part or None, **data,
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip
