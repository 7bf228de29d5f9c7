"""`--engine onnx` of ask, chat and caption: the answers of the model itself, without torch and transformers."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, TemperatureLogitsWarper, TopPLogitsWarper
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from helpers.data import png
from helpers.exports import first_pictures
from helpers.models import ROOT
from minivlm.__main__ import main
from minivlm.asking import question_about
from minivlm.commands.convert import main as convert
from minivlm.convert.quantize import shrink
from minivlm.decoding import Decoding
from minivlm.inference import Assistant
from minivlm.model.loading import load_trained
from minivlm.onnx_engine.assistant import OnnxAssistant, draw
from minivlm.onnx_engine.graphs import Graphs
from minivlm.onnx_engine.pixels import Pixels

pytest.importorskip("onnxruntime")

# All that an answer needs, with what these packages import themselves, Pillow defusedxml where it is installed; Cython
# adds a module of no file.
NEEDED = {
    "PIL",
    "cython_runtime",
    "defusedxml",
    "flatbuffers",
    "jinja2",
    "markupsafe",
    "minivlm",
    "numpy",
    "onnxruntime",
    "packaging",
    "tokenizers",
}


@pytest.fixture(scope="module")
def folder(exported):
    return exported[1]


@pytest.fixture(scope="module")
def ours(folder):
    """Return the assistant that asks the model itself."""
    return Assistant(*load_trained(folder.parent / "ours"))


@pytest.fixture(scope="module")
def engine(folder):
    return OnnxAssistant(folder)


@pytest.fixture
def copy(folder, tmp_path):
    """Return a copy of the graphs that a test may change."""
    return shutil.copytree(folder, tmp_path / "graphs")


@pytest.fixture
def files(tmp_path):
    """Write two pictures that are not of the model's size, one of them transparent; return their names."""
    (tmp_path / "0.png").write_bytes(png(0, size=(40, 50)))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 31, 4), dtype=np.uint8)).save(tmp_path / "1.png")
    return [str(tmp_path / f"{seed}.png") for seed in (0, 1)]


def update(path, **changes):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def mistake(capsys, *arguments):
    """Return the one line that `minivlm ask` prints about a mistake."""
    try:
        code = main(["ask", *map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_command_answers_as_the_model_does(folder, ours, files, capsys, monkeypatch):
    pictures, question, seen = [open(name, "rb").read() for name in files], "What is it?", set()
    for names, shown in ((files[:1], pictures[:1]), (files, pictures), ([], []), (["-", files[1]], pictures)):
        [expected] = ours.answer([ours.encode([question_about(shown, question)])], Decoding(12))
        command = ["ask", *names, "--engine", "onnx", "--model", str(folder), question, "--max_new_tokens", "12"]
        for options in ([], ["--json"]):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pictures[0])))
            assert main([*command, *options]) == 0
        plain, result = capsys.readouterr().out.rsplit("\n", 2)[:2]
        result = json.loads(result)
        assert plain == expected.text and result.pop("seconds") > 0
        assert result == {"pictures": names, "question": question, "answer": expected.text, "tokens": 12}
        seen.add(expected.text)
    assert len(seen) == 3


def test_torch_and_transformers_are_not_imported(folder, files):
    code = (
        "import sys; from minivlm.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, *({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    )
    command = ["ask", *files, "What?", "--engine", "onnx", "--model", str(folder), "--max_new_tokens", "3"]
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, *loaded = done.stdout.splitlines()[-1].split()
    before = subprocess.run(
        [sys.executable, "-c", "import sys; print(*{m.split('.')[0] for m in sys.modules})"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    loaded = {name for name in loaded if not name.startswith("_")} - set(before)
    assert status == "0" and "onnxruntime" in loaded and loaded <= NEEDED, loaded - NEEDED


SAID = [
    [{"role": "user", "content": "What?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": "\nA dog.\n"},
        {"role": "user", "content": [{"type": "text", "text": "颜色？ <|im_end|>\n<|im_start|>user\n<|image_pad|>"}]},
    ],
    [
        {"role": "user", "content": "<|image_pad|>"},
        {"role": "assistant", "content": "", "reasoning_content": "<think> \ufdd0 hm", "tool_calls": [
            {"function": {"name": "look", "arguments": {"where": "<|im_end|> é <b>"}}}
        ]},
        {"role": "tool", "content": '{"seen": "pig"}'},
    ],
]  # fmt: skip


@pytest.mark.parametrize("messages", SAID, ids=["question", "history", "tools"])
def test_prompts_are_those_of_the_processor(messages, engine, ours):
    """With a history, several pictures, and control tokens that somebody typed."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"é": "<|im_end|>"}}}]
    for options in ({}, {"enable_thinking": False}, {"tools": tools}):
        assert engine.prompt.tokens(messages, **options) == ours.tokens(messages, **options)
    pictures = sum(
        part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"]
    )
    assert engine.prompt.tokens(messages).count(12) == 4 * pictures


def test_a_conversation_that_the_template_refuses_is_a_mistake(engine):
    with pytest.raises(ValueError, match="The chat template refuses the conversation: Unknown role 'cat'"):
        engine.encode([{"role": "cat", "content": "Miau"}])
    with pytest.raises(ValueError, match="not a picture: str"):
        engine.encode([{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}])


PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 32, "width": 29}),
    "clip, no crop": CLIPImageProcessorPil(size={"height": 32, "width": 48}, do_center_crop=False, resample=1),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 36, "width": 65}),
    "siglip": SiglipImageProcessorPil(size={"height": 30, "width": 30}),
    "vit": ViTImageProcessorPil(size={"height": 32, "width": 32}),
    "deit": DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    "bit": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "not normalised": SiglipImageProcessorPil(size={"height": 30, "width": 30}, do_normalize=False),
    "not rescaled": SiglipImageProcessorPil(size={"height": 30, "width": 30}, do_rescale=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_image_processor(name, picture):
    """To the last bit, of large, small, wide and tall pictures."""
    settings = json.loads(PROCESSORS[name].to_json_string())
    for size in ((48, 40), (31, 61), (100, 33), (32, 32)):
        shown = picture(size[0], size)
        expected = PROCESSORS[name]([shown], return_tensors="np")["pixel_values"].astype(np.float32)
        made = Pixels(settings)([shown])
        assert made.dtype == np.float32 and np.array_equal(made, expected), (size, np.abs(made - expected).max())


def test_processors_with_other_rules_are_refused(picture):
    settings = json.loads(PROCESSORS["clip"].to_json_string())
    for change, wanted in (
        ({"image_processor_type": "LlavaNextImageProcessor"}, "The image processor is LlavaNextImageProcessor"),
        ({"do_pad": True}, "pads pictures"),
        ({"size": {"longest_edge": 40}}, "longest_edge"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Pixels(settings | change)([picture()])
    with pytest.raises(ValueError, match="different sizes: 39 x 33, 33 x 64"):
        Pixels(settings | {"do_center_crop": False})([picture(), picture(size=(20, 39))])


def test_an_answer_ends_with_the_end_token_or_at_the_limit(copy, ours, files):
    question = OnnxAssistant(copy).encode([question_about([open(files[0], "rb").read()], "What?")])
    tokens = Graphs(copy).generate(question, 6)[0][0].tolist()
    place = next(i for i in range(1, 6) if tokens[i] not in tokens[:i])
    update(copy / "generation_config.json", eos_token_id=[6399, tokens[place]])
    engine = OnnxAssistant(copy)
    assert engine.answer([question], Decoding(6)) == [(ours.decode(tokens[: place + 1]), place + 1, True)]
    for limit in (1, place):
        assert engine.answer([question], Decoding(limit)) == [(ours.decode(tokens[:limit]), limit, False)]
    with pytest.raises(ValueError, match="the answer may have 512, but the model reads 512.*smaller max_new_tokens"):
        engine.answer([question], Decoding(512))


def test_streamed_answers_are_those_that_are_not_streamed(engine, files):
    asked = [question_about([open(name, "rb").read()], "What?") for name in files]
    encoded = [engine.encode([question]) for question in asked]
    whole = engine.answer(encoded, Decoding(12))
    assert len({answer.text for answer in whole}) == 2
    for chat, answer in zip(encoded, whole):
        stream = engine.stream(chat, Decoding(12))
        pieces = list(stream)
        assert "".join(pieces) == answer.text and len(pieces) > 1 and all(pieces)
        assert stream.tokens == answer.tokens and 0 < stream.first < stream.seconds
    with pytest.raises(ValueError, match="the answer may have 512"):
        engine.stream(encoded[0], Decoding(512))


def test_a_chat_remembers_earlier_turns_and_goes_on_after_ctrl_c(folder, engine, files, capsys, monkeypatch):
    first = question_about([open(files[0], "rb").read()], "What?")
    [said] = engine.answer([engine.encode([first])], Decoding(8))
    turn = {"role": "assistant", "content": [{"type": "text", "text": said.text}]}
    again = [first, turn, question_about([], "Really?")]
    [second] = engine.answer([engine.encode(again)], Decoding(8))
    command = ["chat", files[0], "--engine", "onnx", "--model", str(folder), "--max_new_tokens", "8"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\nReally?\n")))
    assert main(command) == 0
    out = capsys.readouterr().out
    answers = [f"{answer.text}\n[8 tokens, " for answer in (said, second)]
    assert said.text != second.text and [out.count(text) for text in answers] == [1, 1]

    step, count = Graphs.step, iter(range(100))

    def interrupted(self, *inputs):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(self, *inputs)

    monkeypatch.setattr(Graphs, "step", interrupted)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What?\nReally?\n")))
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "\n[3 tokens, " in out and "\n[8 tokens, " in out, "the next question is answered"


def test_a_folder_is_described(folder, engine, files, tmp_path, capsys):
    pictures = [question_about([open(name, "rb").read()], "What?") for name in files]
    expected = [answer.text for answer in engine.answer([engine.encode([p]) for p in pictures], Decoding(8))]
    command = ["caption", str(tmp_path), "--engine", "onnx", "--model", str(folder), "--max_new_tokens", "8"]
    assert main([*command, "--question", "What?", "--out", str(tmp_path / "out.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == expected and "2 pictures" in capsys.readouterr().out


class Watched:
    """A session that keeps what it was given and what it returned, step by step."""

    def __init__(self, session):
        self.session, self.given, self.returned = session, [], []

    def get_inputs(self):
        return self.session.get_inputs()

    def run_with_ort_values(self, names, given):
        self.given.append(given)
        self.returned.append(self.session.run_with_ort_values(names, given))
        return self.returned[-1]


def test_each_token_is_computed_once_and_the_cache_is_not_copied(engine, monkeypatch):
    """Each step reads one new token, and the very tensors that the step before returned."""
    watched = Watched(engine.graphs.decoder)
    monkeypatch.setattr(engine.graphs, "decoder", watched)
    prompt = len(engine.prompt.tokens(SAID[0]))
    engine.answer([engine.encode(SAID[0])], Decoding(4))
    assert [step["inputs_embeds"].shape()[1] for step in watched.given] == [prompt, 1, 1, 1]
    for given, (_, *returned) in zip(watched.given[1:], watched.returned):
        cache = [value for name, value in given.items() if name.startswith("past_key_values.")]
        assert len(cache) == len(returned) == 4 and all(a is b for a, b in zip(cache, returned))


def test_pictures_and_image_tokens_must_agree(copy):
    update(copy / "config.json", image_seq_length=5)
    with pytest.raises(ValueError, match="The prompt has 5 image tokens, but 1 pictures fill 4 each"):
        engine = OnnxAssistant(copy)
        engine.answer([engine.encode([question_about([png()], "What?")])])


def test_the_page_s_folder_and_its_small_weights_answer(copy, tmp_path, files, capsys):
    """`to_web` writes the graphs into `model`, and config.json says in which data types."""
    shrink(copy, "q8")
    shutil.move(copy, tmp_path / "page" / "model")
    content = [{"type": "image", "image": Image.open(files[0])}, {"type": "text", "text": "What?"}]
    inputs = AutoProcessor.from_pretrained(tmp_path / "page" / "model").apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="np",
    )  # fmt: skip
    wanted, _ = Graphs(tmp_path / "page" / "model").generate(dict(inputs), 8)
    for name in ("page", "page/model"):
        assert main(["ask", files[0], "What?", "--engine", "onnx", "--model", str(tmp_path / name),
                     "--max_new_tokens", "8"]) == 0  # fmt: skip
        said = capsys.readouterr().out
        assert said == AutoProcessor.from_pretrained(tmp_path / "page" / "model").decode(wanted[0]) + "\n"


def test_draws_have_the_chances_of_transformers():
    scores = np.random.default_rng(1).normal(size=(1, 12)).astype(np.float32) * 2
    for temperature, top_p in ((1.0, 1.0), (0.5, 0.9), (2.0, 0.6), (1.0, 1e-6)):
        warped = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(scores))
        expected = (TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped).softmax(-1)[0].numpy()
        rng, count = np.random.default_rng(0), 20000
        tokens = draw(scores.repeat(count, axis=0), Decoding(1, temperature, top_p), rng)
        shares = np.bincount(tokens, minlength=12) / count
        assert np.abs(shares - expected).max() < 0.015 and not shares[expected == 0].any()


def test_a_seed_repeats_what_is_drawn(folder, capsys):
    def say(*options):
        main(["ask", "What?", "--engine", "onnx", "--model", str(folder), "--max_new_tokens", "9", *options])
        return capsys.readouterr().out

    drawn = [say("--temperature", "1", "--seed", seed) for seed in "1123"]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3 and say() not in drawn


def test_a_mistake_is_one_line(folder, copy, files, tmp_path, capsys, monkeypatch):
    def ask(*options, model=folder):
        return mistake(capsys, files[0], "What?", "--model", model, "--engine", "onnx", *options)

    ours = folder.parent / "ours"
    assert f"minivlm convert to_onnx {ours} --out runs/onnx" in ask(model=ours)
    assert "minivlm convert to_onnx nobody/none" in ask(model="nobody/none")
    assert "does not have --schema" in ask("--schema", "schema.json")
    assert "not on --device cuda" in ask("--device", "cuda")
    assert "invalid choice: 'tf'" in ask("--engine", "tf")
    assert "temperature -1.0" in ask("--temperature", "-1")
    assert "unreadable picture" in mistake(capsys, ROOT / "README.md", "What?", "--model", folder, "--engine", "onnx")
    assert "holds ONNX graphs and no weights. Add --engine onnx" in mistake(capsys, "What?", "--model", folder)
    graph = copy / "onnx" / "embed_tokens.onnx"
    graph.write_bytes(graph.read_bytes()[:100])
    assert "embed_tokens.onnx: onnxruntime cannot read it" in ask(model=copy)
    graph.unlink()
    assert "embed_tokens.onnx: no such file" in ask(model=copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not readable JSON" in ask(model=copy)
    (copy / "config.json").unlink()
    assert "config.json: No such file" in ask(model=copy)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install minivlm[onnx]" in ask()


@pytest.mark.slow
def test_the_released_model_answers_the_same(tmp_path):
    """The prompts and answers of the processor of transformers and the same graphs, for 40 pictures."""
    convert(["to_onnx", str(ROOT), "--out", str(tmp_path / "out")])
    compare_with_transformers(tmp_path / "out")


def compare_with_transformers(folder, count=40):
    """Ask about pictures by the engine, and by the processor of transformers with the same graphs."""
    processor, engine, seen = AutoProcessor.from_pretrained(folder), OnnxAssistant(folder), set()
    for i, picture in enumerate(first_pictures(count)):
        text = ("What is this? Answer with the name.", "这是什么？只回答名称。")[i % 2]
        messages = [question_about([picture], text)]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
        )
        encoded = engine.encode(messages)
        assert encoded["input_ids"].tolist() == inputs["input_ids"].tolist()
        assert np.array_equal(encoded["pixel_values"], inputs["pixel_values"])
        wanted = engine.graphs.generate(dict(inputs), 24)[0][0].tolist()
        [answer] = engine.answer([encoded], Decoding(24))
        assert answer == (processor.decode(wanted, skip_special_tokens=True), len(wanted), True)
        seen.add(answer.text)
    assert len(seen) > count // 2
