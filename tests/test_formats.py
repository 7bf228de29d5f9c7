"""`minivlm publish --formats`: what is made, what is refused, what the cards say, and what goes up."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from huggingface_hub import ModelCard

from helpers.models import ROOT, SIGLIP, save
from helpers.release import PATIENCE, REPO
from minivlm.convert import formats
from minivlm.convert.errors import Inexpressible
from minivlm.convert.to_web import JS
from minivlm.hub.card import MARKER, write_card
from minivlm.hub.children import TEXTS, prepare_child
from minivlm.hub.format_table import RECORD
from minivlm.hub.publish import Release
from minivlm.resources import digest

ONNX = [f"onnx/{name}_{kind}.onnx" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        for kind in ("fp16", "quantized")]  # fmt: skip
INT8 = ["onnx/vision_encoder_fp16.onnx", "onnx/embed_tokens_quantized.onnx", "onnx/decoder_model_merged_int8.onnx"]
FILES = {
    "ONNX": ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
             "tokenizer_config.json", *ONNX],
    "ONNX-int8": ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
                  "chat_template.jinja", *INT8],
    "GGUF": ["model-F16.gguf", "mmproj-F16.gguf", "model-Q8_0.gguf", "mmproj-Q8_0.gguf", "Modelfile"],
}  # fmt: skip
RECORDED = {
    "data": "data/test.parquet",
    "rows": 8,
    "machine": {"processor": "Some CPU", "threads": 1, "torch": "2.13.0", "commit": "0123456789ab"},
    "formats": [
        {"format": "ONNX, 8 bits", "bytes": 11_260_000, "right": {"match": 0.75, "hits": 6, "count": 8}, "same": 7,
         "first_token": 0.0213, "tokens_per_second": 120.4},
        {"format": "GGUF, 8 bits", "bytes": 2_900_000, "why": "the package llama-cpp-python is not installed"},
    ],
    "refused": {"X": "it has no such tower."},
}  # fmt: skip


def write_files(place, names=tuple(FILES)):
    """Write folders with the files of these formats, each of some bytes; return name -> folder."""
    for name in names:
        for file in FILES[name]:
            (place / name / file).parent.mkdir(parents=True, exist_ok=True)
            (place / name / file).write_text(f"{name} {file}")
    return {name: place / name for name in names}


def header(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


# What is made


def test_a_model_is_made_in_each_format_that_can_hold_it(tmp_path, monkeypatch):
    save(tmp_path / "siglip", vision=SIGLIP, vision_feature_layer=-1)
    save(tmp_path / "norm", vision=SIGLIP, vision_feature_layer=-1, projector_layer_norm=True)
    traced = []
    for name in ("ONNX", "ONNX-int8"):
        monkeypatch.setitem(
            formats.WRITERS, name, lambda source, out: traced.append(source) or out.mkdir(parents=True)
        )
    made, refused = formats.make_formats(tmp_path / "siglip", tmp_path / "first")
    assert not refused and traced == 2 * [tmp_path / "siglip"]
    assert {path.name for path in made["GGUF"].iterdir()} == set(FILES["GGUF"])
    sizes = {path.name: path.stat().st_size for path in made["GGUF"].iterdir()}
    assert sizes["model-Q8_0.gguf"] < 0.7 * sizes["model-F16.gguf"]
    assert re.findall(r"FROM ./(\S+)", (made["GGUF"] / "Modelfile").read_text()) == FILES["GGUF"][:2]
    made, refused = formats.make_formats(tmp_path / "norm", tmp_path / "second")
    assert made.keys() == {"ONNX", "ONNX-int8"} and "projector_layer_norm=True" in refused["GGUF"]
    assert not (tmp_path / "second" / "GGUF").exists()


def test_only_a_format_that_cannot_hold_the_model_is_passed_over(tmp_path, monkeypatch):
    def fail(error):
        def write(source, out):
            raise error

        monkeypatch.setattr(formats, "WRITERS", {"ONNX": write})
        return formats.make_formats("a model", tmp_path)

    assert fail(Inexpressible("too wide")) == ({}, {"ONNX": "too wide"})
    with pytest.raises(ValueError, match="not installed"):
        fail(ValueError("The package onnx is not installed"))


# The cards


def test_the_card_of_a_format_names_the_model_it_is_of(out, tmp_path):
    write_card(out / "final", REPO, {"metrics": {"tasks": {"name": {"de": {"match": 1, "hits": 1, "count": 1, "low": 0,
                                                                           "high": 1}}}}})  # fmt: skip
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, out / "final")
    release, libraries = Release(out / "final", REPO), {}
    for name, folder in write_files(tmp_path / "formats").items():
        child = prepare_child(name, folder, release)
        assert child.repo_id == f"{REPO}-{name}"
        found, text = header(folder), (folder / "README.md").read_text(encoding="utf-8")
        assert (found["base_model"], found["base_model_relation"]) == (REPO, "quantized")
        assert (found["license"], found["language"]) == ("apache-2.0", ["de"]), "those of the model"
        assert found["pipeline_tag"] == "image-text-to-text" and name.lower() in found["tags"]
        # The Hub prints snippets of these libraries, and of vLLM and SGLang, for pages that name them.
        assert not {"transformers", "custom_code", "transformers.js"} & {found["library_name"], *found["tags"]}
        assert ModelCard(text).data.base_model == REPO and child.repo_id in text.split("---\n", 2)[2]
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
        libraries[name] = found["library_name"]
    assert libraries == {"ONNX": "onnx", "ONNX-int8": "onnx", "GGUF": "gguf"}


def home(name):
    return f"/{'home'}/somebody/{name}"  # in parts, or the test for such paths finds this file


DEFECTS = {
    "mmproj-*.gguf is missing": lambda folder: [path.unlink() for path in folder.glob("mmproj-*")],
    "model-F16.gguf is empty": lambda folder: (folder / "model-F16.gguf").write_bytes(b""),
    "notes.txt is a pickle": lambda folder: (folder / "notes.txt").write_bytes(b"\x80\x04}."),
    "Modelfile holds the path": lambda folder: (folder / "Modelfile").write_text(home("x/")),
}


def test_every_defect_of_a_format_is_named_at_once(out, tmp_path):
    write_card(out / "final", REPO, None)
    folder = write_files(tmp_path, ["GGUF"])["GGUF"]
    for spoil in DEFECTS.values():
        spoil(folder)
    with pytest.raises(ValueError) as error:
        prepare_child("GGUF", folder, Release(out / "final", REPO))
    assert all(reason in str(error.value) for reason in DEFECTS) and str(error.value).count("\n- ") == len(DEFECTS)


def test_a_name_that_gets_too_long_and_a_card_without_a_licence_are_refused(out, tmp_path):
    folder = write_files(tmp_path, ["GGUF"])["GGUF"]
    write_card(out / "final", REPO, None)
    name = "a/" + 90 * "b"
    prepare_child("GGUF", folder, Release(out / "final", name[:-1]))
    with pytest.raises(ValueError, match="is not ready"):
        prepare_child("GGUF", folder, Release(out / "final", name + "bb"))
    (out / "final/README.md").write_text("---\nlanguage: en\n---\nMy own words.\n")
    with pytest.raises(ValueError, match="names no license"):
        prepare_child("GGUF", folder, Release(out / "final", REPO))


def test_the_card_of_the_model_shows_the_record_of_its_formats(out):
    weights = digest(out / "final/model.safetensors")
    (out / RECORD).write_text(json.dumps(RECORDED | {"weights_sha256": weights}))
    write_card(out / "final", REPO, None)
    text = (out / "final/README.md").read_text()
    assert "| ONNX, 8 bits | 11.3 | 75.0% (6 of 8) | 7 of 8 | 21 ms | 120 |" in text.splitlines()
    assert "| GGUF, 8 bits | 2.9 | not run |  |  |  |" in text.splitlines()
    about = "on Some CPU, one thread, times are the processor's; torch 2.13.0; commit 0123456789ab"
    assert all(said in text for said in ("first 8 rows", about, "No X: it has no such"))
    (out / RECORD).write_text(json.dumps(RECORDED | {"weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="other weights .* Run minivlm benchmark-formats again"):
        write_card(out / "final", REPO, None)
    (out / RECORD).unlink()
    write_card(out / "final", REPO, None)
    assert MARKER in text and "## Formats" not in (out / "final/README.md").read_text()


# What goes up

# The formats are copied from a folder: tracing a model takes a minute.
COMMAND = """
import shutil
from types import SimpleNamespace
def make_formats(source, place):
    shutil.copytree("{folder}", place, dirs_exist_ok=True)
    return {{path.name: path for path in sorted(place.iterdir())}}, {{"Q4": "it is too wide."}}
sys.modules["minivlm.convert.formats"] = SimpleNamespace(make_formats=make_formats)
sys.exit(main(["publish", *sys.argv[1:]]))
"""


@pytest.fixture
def publish(out, client, tmp_path):
    """Return a function: `publish(*options)` publishes a run with the formats of `tmp_path`/formats."""
    write_files(tmp_path / "formats")
    code = PATIENCE + COMMAND.format(folder=tmp_path / "formats")
    return lambda *options: client(out / "final", "--repo_id", REPO, "--formats", *options, code=code)


def on_the_hub(hub, name):
    repo = hub.repos[f"{REPO}-{name}"]
    return repo.at(repo.resolve(None))


def test_nothing_is_sent_by_a_dry_run_or_if_one_format_is_not_ready(hub, publish, tmp_path):
    dry = publish("--dry_run")
    assert dry.returncode == 0, dry.stderr
    assert re.findall(r"files would go to (\S+)", dry.stdout) == [REPO, *sorted(f"{REPO}-{name}" for name in FILES)]
    assert "no Q4: it is too wide.\n" in dry.stdout
    listed = re.findall(r"^ *([\d,]+)  (\S+)$", dry.stdout, re.M)
    for name, files in FILES.items():
        assert all((str(len(f"{name} {file}")), file) in listed for file in files)
    (tmp_path / "formats/GGUF/Modelfile").unlink()
    done = publish()
    assert done.returncode == 2 and "jinv2/minivlm-GGUF is not ready" in done.stderr
    assert "Modelfile is missing" in done.stderr and not hub.requests


def test_formats_go_up_after_the_model_with_its_options(hub, publish, tmp_path):
    done = publish("--private", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    commits = [re.search(r"models/(\S+)/commit", request.path)[1] for request in hub.asked("commit")]
    assert commits == [REPO, *sorted(f"{REPO}-{name}" for name in FILES)]
    for name, files in FILES.items():
        repo = hub.repos[f"{REPO}-{name}"]
        assert repo.private and list(repo.tags) == ["v1"]
        found = on_the_hub(hub, name)
        assert found.keys() - {".gitattributes", "README.md"} == set(files)
        assert all(found[file] == f"{name} {file}".encode() for file in files)
        assert f"{hub.url}/{REPO}-{name}/commit/" in done.stdout
    # An engine would still load weights that the format no longer has; other files are somebody's.
    for name, files in ((f"{REPO}-GGUF", ["old-Q4_0.gguf", "NOTES.md"]), (REPO, ["somebody.gguf"])):
        hub.repos[name].files |= {file: b"somebody's" for file in files}
        hub.repos[name].commit("by hand")
    (tmp_path / "formats/GGUF/Modelfile").write_text("new")
    assert publish().returncode == 0
    found = on_the_hub(hub, "GGUF")
    assert found["Modelfile"] == b"new" and "NOTES.md" in found and "old-Q4_0.gguf" not in found
    assert "somebody.gguf" in hub.repos[REPO].files


def test_a_format_that_does_not_go_up_is_named_with_the_command_that_goes_on(hub, publish, client, out):
    assert client(out / "final", "--repo_id", REPO).returncode == 0
    hub.fail("commit", 403)  # the model has no change, so the first commit is that of a format
    done = publish()
    assert done.returncode == 2 and "jinv2/minivlm-GGUF is not uploaded: 403" in done.stderr
    assert f"minivlm publish '{out}/final' --repo_id {REPO} --formats" in done.stderr
    assert f"safe in {out}/final" in done.stderr and f"{REPO}-ONNX" not in hub.repos
    assert publish().returncode == 0 and on_the_hub(hub, "ONNX")


def test_a_check_makes_no_formats(client, out):
    done = client(out / "final", "--check", "--formats")
    assert done.returncode == 2 and "--dry_run --formats" in done.stderr


@pytest.mark.slow
def test_the_code_of_the_card_runs_in_node(tmp_path):
    """It needs npm, and the network or npm's cache."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    repo_id = f"{REPO}-ONNX"
    formats.write_onnx(ROOT, tmp_path / "models" / repo_id)
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", JS]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    shutil.copy(ROOT / "data" / "examples" / "pig-face.png", tmp_path / "picture.png")
    [code] = re.findall(r"```js\n(.*?)```", TEXTS["ONNX"].format(parent=REPO, repo_id=repo_id), re.DOTALL)
    local = 'import { env } from "@huggingface/transformers";\nenv.allowRemoteModels = false;\n'
    local += f"env.localModelPath = {json.dumps(str(tmp_path / 'models'))};\n"
    (tmp_path / "card.mjs").write_text(local + code, encoding="utf-8")
    done = subprocess.run(["node", "card.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "pig face", done.stderr
