"""`to_web` writes a folder that a browser can run: files, counts, sizes, answers; what cannot run is refused first."""

import base64
import io
import json
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image

from helpers.convert import fails
from helpers.exports import answers, read
from helpers.models import ROOT, SIGLIP, TEXT, make_config, make_model, make_processor, save
from minivlm.commands.convert import main
from minivlm.convert import to_web as web
from minivlm.convert.quantize import DTYPES, shrink, store_weights
from minivlm.convert.transformers_js import obstacles, picture_size, save_settings
from minivlm.data.pictures import decode_image
from minivlm.onnx_engine.graphs import SUFFIXES, Graphs
from minivlm.resources import FONT, WEB

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RESNET = {
    "model_type": "resnet", "image_size": 32, "embedding_size": 8, "hidden_sizes": [8, 8, 16], "depths": [1, 1, 1],
    "layer_type": "basic", "patch_size": 4,
}  # fmt: skip
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
EXAMPLES = sorted((ROOT / "data" / "examples").glob("*.png"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The released model as a page."""
    folder = tmp_path_factory.mktemp("web") / "page"
    main(["to_web", str(ROOT), "--out", str(folder)])
    return folder


# What is written


def test_the_folder_has_what_the_page_and_transformers_js_look_for(page):
    assert {path.name for path in WEB.iterdir()} < {path.name for path in page.iterdir()}
    graphs = {path.name for path in (page / "model" / "onnx").iterdir()}
    dtypes = {"vision_encoder": "fp16", "embed_tokens": "q8", "decoder_model_merged": "q8"}
    assert graphs == {"vision_encoder_fp16.onnx", "embed_tokens_quantized.onnx", "decoder_model_merged_quantized.onnx"}
    config, pictures = read(page / "model" / "config.json"), read(page / "model" / "preprocessor_config.json")
    assert (config["model_type"], config["text_config"]["model_type"]) == ("llava", "qwen3")
    assert config["transformers.js_config"] == {"dtype": dtypes} and config["image_token_index"] == 12
    assert (pictures["processor_class"], pictures["size"]) == ("LlavaProcessor", {"height": 128, "width": 128})
    assert "generation" in read(page / "model" / "tokenizer_config.json")["chat_template"]
    processor = read(page / "model" / "processor_config.json")
    assert (128 // processor["patch_size"]) ** 2 + processor["num_additional_image_tokens"] == 64
    assert (page / "README.md").read_text(encoding="utf-8").startswith("---\n")
    assert "sdk: static\n" in (page / "README.md").read_text(encoding="utf-8")
    examples = read(page / "settings.json")["examples"]
    assert examples == [path.name for path in EXAMPLES] and all(
        (page / "examples" / name).exists() for name in examples
    )
    here = str(ROOT).encode()
    assert not [path for path in page.rglob("*") if path.is_file() and here in path.read_bytes()]


def test_the_graphs_have_at_most_12_mb(page):
    assert sum(path.stat().st_size for path in (page / "model" / "onnx").iterdir()) <= 12e6


@torch.no_grad()
@pytest.mark.parametrize("question", ["What is this? Answer with the name.", "这是什么？只回答名称。"])
def test_8_bit_graphs_answer_as_fp32_does(question, page):
    pictures = [decode_image(path) for path in EXAMPLES]
    asked = list(answers(ROOT, pictures, question))
    for inputs, expected in asked:
        tokens, _ = Graphs(page / "model").generate({key: value.numpy() for key, value in inputs.items()}, 24)
        assert tokens.tolist() == expected
    assert len({tuple(expected[0]) for _, expected in asked}) == 4


# How weights are rounded


def run(model, inputs):
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0]


def one_operator(kind, inputs, weight, **options):
    helper = onnx.helper
    node = helper.make_node(kind, [name if name != "w" else "weight" for name in inputs], ["y"], **options)
    types = {"x": onnx.TensorProto.FLOAT, "ids": onnx.TensorProto.INT64}
    values = [helper.make_tensor_value_info(name, types[name], None) for name in inputs if name != "w"]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", values, [output], [onnx.numpy_helper.from_array(weight, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "inputs", "shape", "axis", "options"),
    [
        ("MatMul", ["x", "w"], (8, 5), 1, {}),
        ("Gemm", ["x", "w"], (5, 8), 0, {"transB": 1}),
        ("Gemm", ["x", "w"], (8, 5), 1, {}),
        ("Conv", ["x", "w"], (5, 2, 2, 2), 0, {}),
        ("Gather", ["w", "ids"], (6, 5), 0, {}),
    ],
)
def test_each_channel_is_rounded_to_its_own_127th(kind, inputs, shape, axis, options):
    """A channel of small numbers beside one of large ones stays exact: one scale for all would make it zero."""
    rng = np.random.default_rng(0)
    wide = [1] * len(shape)
    wide[axis] = -1
    scale = (10.0 ** -np.arange(shape[axis])).reshape(wide)
    weight = rng.integers(-127, 128, shape) * scale / 127
    index = [slice(None)] * len(shape)
    for channel in range(shape[axis]):
        index[axis] = channel
        weight[tuple(index)].flat[0] = scale.flat[channel]
    first = tuple(slice(None) if i == axis else 0 for i in range(len(shape)))
    weight[first] = scale.reshape(-1)  # the largest number of each channel
    weight = weight.astype(np.float32)
    given = {"ids": np.array([[0, 3, 5]])} if kind == "Gather" else {"x": rng.normal(size=(3, 8)).astype(np.float32)}
    if kind == "Conv":
        given = {"x": rng.normal(size=(1, 2, 4, 4)).astype(np.float32)}
    model = one_operator(kind, inputs, weight, **options)
    expected = run(model, given)
    store_weights(model, "q8")
    assert max(len(tensor.raw_data) for tensor in model.graph.initializer) == max(weight.size, 4 * shape[axis])
    np.testing.assert_allclose(run(model, given), expected, rtol=1e-4, atol=1e-9)


def test_the_data_types_give_nearly_the_same_logits(exported, tmp_path):
    logits = {}
    for dtype in ("fp32", "fp16", "q8"):
        shutil.copytree(exported[1], tmp_path / dtype)
        shrink(tmp_path / dtype, dtype)
        names = {path.name for path in (tmp_path / dtype / "onnx").iterdir()}
        assert names == {f"{name}{SUFFIXES[stored]}.onnx" for name, stored in DTYPES[dtype].items()}
        inputs = {"input_ids": np.array([[5, 12, 12, 12, 12, 7, 9]]), "attention_mask": np.ones((1, 7), np.int64)}
        inputs["pixel_values"] = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
        logits[dtype] = Graphs(tmp_path / dtype).generate(inputs, 1)[1]
    largest = np.abs(logits["fp32"]).max()
    assert 0 < np.abs(logits["fp16"] - logits["fp32"]).max() < 0.003 * largest
    assert 0 < np.abs(logits["q8"] - logits["fp32"]).mean() < 0.1 * np.abs(logits["fp32"]).mean()


# What transformers.js can run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_feature_select_strategy": "full"},
        {"vision": SIGLIP, "vision_feature_layer": None},
        {"vision": RESNET, "vision_feature_layer": None},
        {"pixel_shuffle_factor": 2, "projector_type": "linear"},
        {"vision": {"image_size": 40}},  # 16 does not divide it
    ],
    ids=["class token dropped", "class token kept", "no class token", "feature map", "pixel shuffle", "odd size"],
)
def test_image_tokens_are_counted_as_transformers_js_counts(options, tmp_path):
    model = make_model(make_config(options.pop("vision", {}), TEXT | {"vocab_size": 6400}, **options))
    size = model.config.vision_config.image_size
    processor = make_processor(size=size, image_tokens=model.config.image_seq_length)
    save_settings(model, processor, tmp_path)
    settings = read(tmp_path / "processor_config.json")
    counted = (size // settings["patch_size"]) ** 2 + settings["num_additional_image_tokens"]  # processing_llava.js
    assert counted == model.config.image_seq_length
    assert read(tmp_path / "config.json")["text_config"]["num_hidden_layers"] == 2


def test_pictures_of_several_sizes_and_unknown_decoders_are_obstacles():
    crops = make_processor()
    crops.image_processor.size, crops.image_processor.crop_size = {"shortest_edge": 40}, {"height": 32, "width": 32}
    assert picture_size(crops.image_processor) is None and "of different sizes" in obstacles(make_config(), crops)[0]
    crops.image_processor.do_center_crop = True
    assert picture_size(crops.image_processor) == (32, 32) and obstacles(make_config(), crops) == []
    falcon = {"model_type": "falcon", "vocab_size": 6400, "hidden_size": 32, "num_hidden_layers": 2}
    config = make_config()
    config.text_config = type(config)(text_config=falcon).text_config
    assert "a decoder of type 'falcon'" in obstacles(config, crops)[0]


def test_a_model_that_cannot_run_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "write_graphs", lambda *_: pytest.fail("it was traced"))
    save(tmp_path / "ours")
    settings = read(tmp_path / "ours" / "processor_config.json")
    settings["image_processor"]["size"] = {"height": 48, "width": 48}
    (tmp_path / "ours" / "processor_config.json").write_text(json.dumps(settings))
    said = fails(["to_web", str(tmp_path / "ours"), "--out", str(tmp_path / "out")], tmp_path / "out")
    assert "the processor makes pictures of 48 x 48 pixels" in said and "here 32 x 32" in said


# Scripts of other projects


def rules(page):
    """Return the page's Content-Security-Policy: directive -> sources."""
    text = re.search(r'Security-Policy" content="([^"]*)"', (page / "index.html").read_text(encoding="utf-8"))[1]
    return {words.split()[0]: words.split()[1:] for words in text.split("; ")}


def pack(folder, files):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tgz", "w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return folder


def test_scripts_come_from_pinned_addresses_with_digests(page):
    library = read(page / "settings.json")["library"]
    for name, script in library.items():
        assert re.fullmatch(
            rf"https://cdn\.jsdelivr\.net/npm/[\w@/-]+@\d[\w.-]+/dist/{re.escape(name)}", script["url"]
        )
        assert len(base64.b64decode(script["integrity"].removeprefix("sha384-"))) == 48
    assert "https://cdn.jsdelivr.net" in rules(page)["connect-src"]
    assert rules(page)["script-src"] == ["'self'", "blob:", "'wasm-unsafe-eval'"]
    assert rules(page)["default-src"] == ["'none'"]


def test_a_copied_library_is_checked_and_the_page_then_names_no_other_host(tmp_path, monkeypatch):
    files = {name: name.encode() for name in web.LIBRARY}
    expected = {name: web.Script("p@1", len(data), web.digest(data)) for name, data in files.items()}
    monkeypatch.setattr(web, "LIBRARY", expected)
    archived = {f"dist/{name}": data for name, data in files.items()} | {"LICENSE": b"licence"}
    scripts = web.read_library(pack(tmp_path / "good", archived))
    assert scripts == files | {"LICENSE": b"licence"}
    (tmp_path / "page" / "model").mkdir(parents=True)
    web.write_page(tmp_path / "page", scripts)
    written = b"".join(
        path.read_bytes() for path in (tmp_path / "page").iterdir() if path.suffix in (".html", ".json")
    )
    assert b"://" not in written and rules(tmp_path / "page")["connect-src"] == ["'self'"]
    library = read(tmp_path / "page" / "settings.json")["library"]
    assert all((tmp_path / "page" / script["url"]).read_bytes() == files[name] for name, script in library.items())
    archived["dist/transformers.min.js"] += b" "
    with pytest.raises(ValueError, match=r"transformers\.min\.js of the version that was tested.*npm pack"):
        web.read_library(pack(tmp_path / "changed", archived))


# The page's own scripts, in Node


def node(code, *files):
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code, *map(str, files)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    return done.stdout


RESIZE = """
import { readFileSync, writeFileSync } from "node:fs";
const [script, folder] = process.argv.slice(1);
const { FILTERS, resize } = await import(script);
for (const { from, to, filter } of JSON.parse(readFileSync(`${folder}/cases.json`))) {
  const name = `${folder}/${from.join("x")}`;
  const picture = { data: readFileSync(`${name}.rgb`), width: from[0], height: from[1] };
  writeFileSync(`${name}_${to.join("x")}_${filter}.out`, resize(picture, ...to, FILTERS[filter]).data);
}
"""


@needs_node
def test_pictures_are_resized_as_pillow_does_bit_for_bit(tmp_path):
    # Of some the height comes first in Pillow, and the order shows.
    sizes, cases = [(320, 200), (96, 96), (127, 130), (1, 7), (128, 333), (127, 333), (250, 400)], []
    rng = np.random.default_rng(0)
    for width, height in sizes:
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        noise[: height // 2] = noise[: height // 2] // 128 * 255  # hard edges, at which bicubic overshoots
        Image.fromarray(noise).save(tmp_path / f"{width}x{height}.png")
        (tmp_path / f"{width}x{height}.rgb").write_bytes(noise.tobytes())
        cases += [{"from": (width, height), "to": to, "filter": f} for to in ((128, 128), (50, 24)) for f in (1, 2, 3)]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    node(RESIZE, WEB / "pictures.js", tmp_path)
    for case in cases:
        (width, height), to = case["from"], case["to"]
        expected = Image.open(tmp_path / f"{width}x{height}.png").resize(to, case["filter"])
        out = tmp_path / f"{width}x{height}_{to[0]}x{to[1]}_{case['filter']}.out"
        assert out.read_bytes() == expected.tobytes(), case


@needs_node
def test_both_languages_say_everything_in_characters_of_the_font():
    code = "const all = await import(process.argv[1]); console.log(JSON.stringify({ ...all }))"
    said = json.loads(node(code, WEB / "sentences.js"))
    english, chinese = said["SENTENCES"]["en"], said["SENTENCES"]["zh"]
    assert english.keys() == chinese.keys() and all(english.values()) and all(chinese.values())
    used = set("".join([*chinese.values(), english["other"], *(example["zh"] for example in said["EXAMPLES"])]))
    known = set(map(chr, TTFont(FONT).getBestCmap()))
    assert not used - known, "write it with other characters, or add them to tools/subset_font.py"
    assert [example["file"] for example in said["EXAMPLES"] if (ROOT / "data" / "examples" / example["file"]).exists()]
    text = (WEB / "index.html").read_text(encoding="utf-8") + (WEB / "page.js").read_text(encoding="utf-8")
    assert set(re.findall(r'data-(?:say|label)="(\w+)"|say\("(\w+)"\)', text)) and "innerHTML" not in text
    named = {a or b for a, b in re.findall(r'data-(?:say|label)="(\w+)"|say\("(\w+)"\)', text)}
    assert named <= english.keys()
