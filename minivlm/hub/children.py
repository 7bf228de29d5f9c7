"""Put the formats of other engines on the Hub: each in a repository of its own, whose card names the model it is of.

The Hub lists these repositories on the model's page as quantizations, by `base_model` in their cards.
"""

import fnmatch
import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from minivlm.hub.check import files_of, is_pickle
from minivlm.hub.findings import read_card_header
from minivlm.hub.publish import EXPORTED, Release, upload
from minivlm.hub.secrets import leaks
from minivlm.resources import HUB_MODEL

# With library_name transformers.js the Hub prints pipeline("image-text-to-text"); transformers.js 4.3 has none.
LIBRARIES = {"ONNX": "onnx", "ONNX-int8": "onnx", "GGUF": "gguf"}
# Files without which the engines do not load a format.
NEEDED = {
    "ONNX": "config.json generation_config.json preprocessor_config.json tokenizer.json tokenizer_config.json "
    "onnx/vision_encoder_*.onnx onnx/embed_tokens_*.onnx onnx/decoder_model_merged_*.onnx".split(),
    "ONNX-int8": "config.json generation_config.json processor_config.json tokenizer.json chat_template.jinja "
    "onnx/vision_encoder_*.onnx onnx/embed_tokens_*.onnx onnx/decoder_model_merged_int8.onnx".split(),
    "GGUF": ["model-*.gguf", "mmproj-*.gguf", "Modelfile"],
}
TEXTS = {
    "ONNX": """\
The graphs of [{parent}](https://huggingface.co/{parent}) for transformers.js and ONNX Runtime. transformers.js loads
those with weights of 8 bits (those of the vision tower have 16). `dtype: "fp16"` chooses 16 bits for all. The
arithmetic is fp32 in both.

```js
import {{ AutoModelForImageTextToText, AutoProcessor, load_image }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{repo_id}");
const model = await AutoModelForImageTextToText.from_pretrained("{repo_id}");
const content = [{{ type: "image" }}, {{ type: "text", text: "What is this?" }}];
const prompt = processor.apply_chat_template([{{ role: "user", content }}], {{ add_generation_prompt: true }});
const inputs = await processor(await load_image("picture.png"), prompt);
const outputs = await model.generate({{ ...inputs, max_new_tokens: 64, do_sample: false }});
const answer = outputs.slice(null, [inputs.input_ids.dims[1], null]);
console.log(processor.batch_decode(answer, {{ skip_special_tokens: true }})[0]);
```""",
    "ONNX-int8": """\
The graphs of [{parent}](https://huggingface.co/{parent}) for ONNX Runtime on a CPU. The decoder multiplies in 8 bits.

```bash
git clone https://huggingface.co/{code}
pip install "./{package}[onnx]"
hf download {repo_id} --local-dir graphs
minivlm ask picture.png "What is this?" --engine onnx --model graphs
```""",
    "GGUF": """\
The files of [{parent}](https://huggingface.co/{parent}) for llama.cpp, Ollama and LM Studio, with weights of 16 and of
8 bits. `model-*.gguf` is the decoder, `mmproj-*.gguf` the vision tower with its projector.

```bash
llama-server -hf {repo_id}:F16
```

Give it square pictures: llama.cpp pads others to a square, and the model was trained on pictures squeezed to one.""",
}


@dataclass(frozen=True)
class Child:
    """Describe a format that goes to the Hub: its name, its folder here, its repository there."""

    name: str
    folder: Path
    repo_id: str


def prepare_child(name: str, folder: Path, release: Release) -> Child:
    """Write the card of a format, put the licence files of the model beside it, and check all of it.

    Args:
        name: a key of `LIBRARIES`.
        folder: where the format is.
        release: the model's, whose card has been written.

    Raises:
        ValueError: the format could not be loaded from the Hub or must not go there. All reasons are named at once.
    """
    child, header = Child(name, folder, f"{release.repo_id}-{name}"), read_card_header(release.folder)
    for file in ("LICENSE", "NOTICE"):
        if (release.folder / file).is_file():
            shutil.copy(release.folder / file, folder)
    write_child_card(child, release.repo_id, header)
    if problems := child_problems(child):
        raise ValueError(f"{child.repo_id} is not ready for the Hub:\n" + "\n".join(f"- {p}." for p in problems))
    return child


def write_child_card(child: Child, parent: str, header: dict) -> None:
    """Write README.md of a format.

    Args:
        parent: Hub id of the model.
        header: of the model's card, for licence and languages.
    """
    fields = {
        "language": header.get("language"),
        "license": header.get("license"),
        "library_name": LIBRARIES[child.name],
        "pipeline_tag": "image-text-to-text",
        "base_model": parent,
        "base_model_relation": "quantized",
        "tags": ["vision-language", "minivlm", child.name.lower()],
    }
    known = yaml.safe_dump({k: v for k, v in fields.items() if v}, sort_keys=False, allow_unicode=True)
    text = TEXTS[child.name].format(
        parent=parent, repo_id=child.repo_id, code=HUB_MODEL, package=HUB_MODEL.split("/")[1]
    )
    card = f"---\n{known}---\n\n# {child.repo_id.split('/')[-1]}\n\n{text}\n\nMade by MiniVLM.\n"
    (child.folder / "README.md").write_text(card, encoding="utf-8")


def child_problems(child: Child) -> list[str]:
    """Name each reason why a format must not go to the Hub, by its name, its card and its files."""
    problems, files = [], files_of(child.folder)
    names = [file.as_posix() for file in files]
    try:
        validate_repo_id(child.repo_id)
        ModelCard((child.folder / "README.md").read_text(encoding="utf-8"), ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as error:
        problems.append(" ".join(str(error).split())[:300].rstrip("."))
    if not read_card_header(child.folder).get("license"):
        problems.append("the model's card names no license. Add one to the header of its README.md")
    problems += [f"{pattern} is missing" for pattern in NEEDED[child.name] if not fnmatch.filter(names, pattern)]
    for file in files:
        path = child.folder / file
        if not path.stat().st_size:
            problems.append(f"{file.as_posix()} is empty")
        elif is_pickle(path):
            problems.append(f"{file.as_posix()} is a pickle, which runs code when it is loaded")
        else:
            problems += [f"{file.as_posix()} holds {leak}" for leak in leaks(path.read_bytes())]
    return problems


def publish_child(child: Child, release: Release) -> str:
    """Put a format that `prepare_child` returned on the Hub as `publish` does the model; return the commit's URL.

    Raises:
        ReleaseError: the upload failed.
    """
    return upload(release, child.folder, child.repo_id, lambda: files_of(child.folder), EXPORTED)
