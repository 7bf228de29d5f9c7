"""Measure a model in its formats: size, right answers, answers like those of transformers, speed.

Every format, and every server, is asked each question in turn, one question at a time. So a change of the machine's
speed reaches all.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import ProcessorMixin
from transformers.generation.streamers import BaseStreamer

from minivlm.benchmark.llama import MARKER, LlamaCpp
from minivlm.benchmark.measure import clock
from minivlm.benchmark.remote import Server, with_urls
from minivlm.convert.formats import FILES, GRAPHS
from minivlm.convert.quantize import DTYPES
from minivlm.data.pictures import decode_image
from minivlm.data.rows import Rows
from minivlm.evaluation.scoring import CAPTION_TOKENS, GENERATIVE, cell, is_right, prompts
from minivlm.model.loading import load_trained
from minivlm.onnx_engine.graphs import Graphs, graph_files
from minivlm.reading import ANSWER_TOKENS
from modeling_minivlm import MiniVLMForConditionalGeneration

REFERENCE = "transformers"
BITS = {"fp16": "16 bits", "q8": "8 bits", "f16": "16 bits", "q8_0": "8 bits"}

# Answers a question: it takes the question, the longest answer in tokens, and what to call with each token.
Side = Callable[[dict, int, Callable[[int], None]], None]


class Watch(BaseStreamer):
    """Pass each new token of `generate` on to a function; the prompt is not passed on."""

    def __init__(self, note: Callable[[int], None]):
        self.note, self.started = note, False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        if self.started:
            self.note(value.item())
        self.started = True

    def end(self) -> None:
        """Take the end of the answer."""


def transformers_side(model: MiniVLMForConditionalGeneration) -> Side:
    """Return what answers by transformers, in fp32."""
    model.float().eval()

    @torch.inference_mode()
    def work(question: dict, most: int, note: Callable[[int], None]) -> None:
        model.generate(**question["torch"], max_new_tokens=most, do_sample=False, streamer=Watch(note))

    return work


def onnx_side(folder: Path, dtype: str, threads: int) -> Side:
    """Return what answers by ONNX Runtime, with the graphs of a key of `DTYPES`."""
    graphs = Graphs(folder, threads, DTYPES[dtype])

    def work(question: dict, most: int, note: Callable[[int], None]) -> None:
        inputs = {name: tensor.numpy() for name, tensor in question["torch"].items()}
        for token, _ in graphs.stream(inputs, most):
            note(int(token[0]))

    return work


def llama_side(folder: Path, outtype: str, threads: int, suppressed: list[int]) -> Side:
    """Return what answers by llama.cpp, with the files of a key of `FILE_TYPES`; it prepares the pictures itself."""
    engine = LlamaCpp(folder, threads=threads, outtype=outtype)

    def work(question: dict, most: int, note: Callable[[int], None]) -> None:
        for token in engine.stream(question["marked"], question["pictures"], most, suppressed):
            note(token)

    return work


def server_side(server: Server, processor: ProcessorMixin) -> Side:
    """Return what asks a server, which makes the prompt and prepares the pictures itself.

    A server sends text. Its tokens are counted anew, and the one that ends an answer is taken as sent with the end.
    """

    def work(question: dict, most: int, note: Callable[[int], None]) -> None:
        count = 0
        for piece in server.stream(question["messages"], most):
            for token in processor.tokenizer(piece, add_special_tokens=False)["input_ids"]:
                count += 1
                note(token)
        if count < most:
            note(processor.tokenizer.eos_token_id)

    return work


def open_sides(
    model: MiniVLMForConditionalGeneration, made: dict[str, Path], weights: list[Path], threads: int
) -> dict[str, dict]:
    """Return format -> `files`, and `side`, or `why` there is none.

    Args:
        made: of `make_formats`.
        weights: files of the model's own weights.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    suppressed = model.generation_config.suppress_tokens or []
    sides = {f"{REFERENCE}, {dtype}": {"files": weights}}  # its side comes last: it changes the model to fp32
    for choice in GRAPHS if "ONNX" in made else ():
        files = graph_files(made["ONNX"], DTYPES[choice])
        sides[f"ONNX, {BITS[choice]}"] = {"files": files, "side": onnx_side(made["ONNX"], choice, threads)}
    if "ONNX-int8" in made:
        files = graph_files(made["ONNX-int8"])
        sides["ONNX, multiplied in 8 bits"] = {"files": files, "side": onnx_side(made["ONNX-int8"], "int8", threads)}
    for outtype in FILES if "GGUF" in made else ():
        row = sides[f"GGUF, {BITS[outtype]}"] = {"files": sorted(made["GGUF"].glob(f"*-{outtype.upper()}.gguf"))}
        if importlib.util.find_spec("llama_cpp") is None:
            row["why"] = "the package llama-cpp-python is not installed"
        else:
            row["side"] = llama_side(made["GGUF"], outtype, threads, suppressed)
    sides[f"{REFERENCE}, {dtype}"]["side"] = transformers_side(model)
    return sides


def make_questions(rows: Rows, processor: ProcessorMixin) -> list[dict]:
    """Return the items of `prompts` with their inputs for each engine.

    `torch` holds tensors. `pictures` are decoded, and in the prompt `marked` the marker of llama.cpp stands where one
    is. `messages` are the turns as a server takes them.
    """
    questions = []
    for item in prompts(rows, processor):
        pictures = [decode_image(image) for image in item["images"]]
        inputs = processor(text=item["text"], images=pictures or None, return_tensors="pt")
        marked = item["text"].replace(processor.image_token, MARKER)
        turns = with_urls(rows.sample(item["row"])["messages"][:-1], pictures)
        questions.append(item | {"torch": dict(inputs), "pictures": pictures, "marked": marked, "messages": turns})
    return questions


def ask(side: Side, question: dict, clock: Callable[[], float]) -> tuple[list[int], list[float]]:
    """Return the tokens of an answer, and the seconds from the question to each of them."""
    tokens, times, start = [], [], clock()

    def note(token: int) -> None:
        tokens.append(token)
        times.append(clock() - start)

    side(question, CAPTION_TOKENS if question["task"] in GENERATIVE else ANSWER_TOKENS, note)
    return tokens, times


def measure(
    sides: dict[str, Side], questions: list[dict], processor: ProcessorMixin, clock: Callable[[], float] = clock
) -> dict[str, dict]:
    """Ask every side every question; return side -> `right`, `same`, `first_token`, `tokens_per_second`, `answers`.

    `right` is a cell of `scoring`, without captions. `same` counts answers like those of the first side.
    `first_token` is the mean in seconds; `tokens_per_second` counts the tokens after the first one of an answer, and
    is 0 if there are none.
    """
    found = {name: {"texts": [], "first": [], "further": 0, "seconds": 0.0} for name in sides}
    for side in sides.values():
        ask(side, questions[0], clock)  # it allocates and fills caches, and does not count
    for question in tqdm(questions, desc="answering", unit="row", dynamic_ncols=True):
        for name, side in sides.items():
            tokens, times = ask(side, question, clock)
            found[name]["texts"].append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
            found[name]["first"].append(times[0])
            found[name]["further"] += len(times) - 1
            found[name]["seconds"] += times[-1] - times[0]
    reference = next(iter(found.values()))["texts"]
    return {name: summarise(row, questions, reference) for name, row in found.items()}


def summarise(row: dict, questions: list[dict], reference: list[str]) -> dict:
    """Return what `measure` returns of a side."""
    pairs = list(zip(questions, row["texts"], strict=True))
    return {
        "right": cell([is_right(item, text) for item, text in pairs if item["task"] not in GENERATIVE]),
        "same": sum(text == other for text, other in zip(row["texts"], reference, strict=True)),
        "first_token": sum(row["first"]) / len(row["first"]),
        "tokens_per_second": row["further"] / row["seconds"] if row["further"] else 0.0,
        "answers": row["texts"],
    }


def measure_formats(
    source: Path, made: dict[str, Path], rows: Rows, threads: int, servers: dict[str, Server]
) -> list[dict]:
    """Return a row for each format of the model in `source`: `format`, `bytes`, and what `measure` returns, or `why`.

    Args:
        made: of `make_formats`.
        servers: name -> what to ask, too; the bytes of its weights are not known. They compute in processes of their
            own, so with one all times are by the clock on the wall.
    """
    model, processor = load_trained(source)
    sides = open_sides(model, made, sorted(source.glob("*.safetensors")), threads)
    sides |= {name: {"files": None, "side": server_side(server, processor)} for name, server in servers.items()}
    running = {name: row["side"] for name, row in sides.items() if "side" in row}
    questions = make_questions(rows, processor)
    found = measure(running, questions, processor, time.perf_counter if servers else clock)
    return [
        {"format": name, "bytes": None if row["files"] is None else sum(path.stat().st_size for path in row["files"])}
        | (found[name] if name in found else {"why": row["why"]})
        for name, row in sides.items()
    ]
