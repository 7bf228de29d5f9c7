"""What may go to the Hub, and the card that goes with it."""

import json
import os
import re
import subprocess

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from helpers.models import make_model, make_pixels, make_prompt, same
from helpers.release import REPO, RUN, assert_published
from minivlm.hub.card import MARKER, write_card
from minivlm.hub.check import check, files_of

# What was published loads again


LOAD = """
import re, sys
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained("jinv2/minivlm", trust_remote_code=True, revision="v1.0")
assert "configuration_minivlm" not in sys.modules, "this is the checkout's code, not the Hub's"
inputs = torch.load("inputs.pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, "logits.pt")
exec(re.search("```python\\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)[1])
print("type", type(processor).__name__)
"""


def test_published_model_answers_alike_and_its_card_tells_how(out, hub, client, tmp_path):
    done = client(out / "final", "--repo_id", REPO, "--private", "--tag", "v1.0", "--message", "First light")
    assert done.returncode == 0, done.stderr
    commit, message, _ = hub.repos[REPO].commits[-1]
    assert f"{hub.url}/{REPO}/commit/{commit}" in done.stdout.splitlines() and message == "First light"
    assert hub.repos[REPO].private and hub.repos[REPO].tags == {"v1.0": commit}
    assert_published(hub, out / "final")
    for request in hub.requests:
        assert request.authorized is (None if request.endpoint in ("harnesses", "put") else True), request

    hub.forget()
    place = tmp_path / "elsewhere"
    place.mkdir()
    inputs = {"input_ids": make_prompt(3, "image", 5), "pixel_values": make_pixels(1)}
    torch.save(inputs, place / "inputs.pt")
    Image.radial_gradient("L").convert("RGB").save(place / "picture.png")
    loaded = client(out / "final/README.md", code=LOAD, cwd=place, HF_HOME=str(place / "home"), HF_DEBUG="")
    assert loaded.returncode == 0, loaded.stderr
    assert "type MiniVLMProcessor" in loaded.stdout
    with torch.no_grad():
        expected = make_model(text={"vocab_size": 6400})(**inputs).logits
    same(torch.load(place / "logits.pt"), expected)  # not bit for bit: sums depend on the number of threads
    assert [request.authorized for request in hub.asked("get")] == [None], "the storage's host was sent the token"


def test_publishing_again_adds_a_commit_only_if_something_changed(out, hub, client):
    final, shards = out / "final", "model-00001-of-00002.safetensors"
    first = client(final, "--repo_id", REPO)
    again = client(final, "--repo_id", REPO, "--tag", "v1")
    assert [first.returncode, again.returncode] == [0, 0], first.stderr + again.stderr
    assert first.stdout.splitlines()[0] == again.stdout.splitlines()[0]
    assert_published(hub, final)
    hub.repos[REPO].files["NOTES.md"] = b"somebody's"

    (final / "model.safetensors").unlink()
    make_model(seed=1, text={"vocab_size": 6400}).save_pretrained(final, max_shard_size="500KB")
    assert (final / shards).is_file()
    third = client(final, "--repo_id", REPO, "--tag", "v1")
    assert_published(hub, final, commits=2)
    assert "model.safetensors" not in hub.repos[REPO].files, "transformers would load this old one, not the new shards"
    assert "NOTES.md" in hub.repos[REPO].files
    assert third.returncode == 2 and "is uploaded" in third.stderr and "names another commit" in third.stderr


# What is refused before anything is sent


def without(name, key):
    def change(final):
        content = json.loads((final / name).read_text())
        content["auto_map"].pop(key)
        (final / name).write_text(json.dumps(content))

    return change


def cut_short(final):
    os.truncate(final / "model.safetensors", (final / "model.safetensors").stat().st_size - 1)


def git_lfs_pointer(final):
    (final / "model.safetensors").write_text("version 1\noid sha256:0\nsize 1048576\n")


def one_shard_lost(final):
    (final / "model.safetensors").unlink()
    make_model().save_pretrained(final, max_shard_size="50KB")
    next(final.glob("model-00002-of-*.safetensors")).unlink()


def needs_sibling(final):
    with open(final / "modeling_minivlm.py", "a") as file:
        file.write("\nfrom .attention_minivlm import attend\n")


def remove(name):
    return lambda final: (final / name).unlink()


def add(name):
    return lambda final: (final / name).write_bytes(b"")


BROKEN = {
    "no config.json": remove("config.json"),
    "model.safetensors is missing": remove("model.safetensors"),
    "no whole safetensors file": cut_short,
    "no whole safetensors file (": git_lfs_pointer,
    "model-00002-of-": one_shard_lost,
    "processor_config.json is missing": remove("processor_config.json"),
    "processor_config.json has no AutoProcessor": without("processor_config.json", "AutoProcessor"),
    "config.json has no AutoConfig": without("config.json", "AutoConfig"),
    "processing_minivlm.py is missing": remove("processing_minivlm.py"),
    "configuration_minivlm.py is missing": remove("configuration_minivlm.py"),
    "attention_minivlm.py is missing": needs_sibling,
    "pytorch_model.bin is a pickle": add("pytorch_model.bin"),
    "training_args.pt is a pickle": add("training_args.pt"),
    "model.pth is a pickle": add("model.pth"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_folder_that_would_not_load_is_refused(reason, out):
    check(out / "final", REPO)
    BROKEN[reason](out / "final")
    with pytest.raises(ValueError, match=re.escape(reason)):
        check(out / "final", REPO)


@pytest.mark.parametrize("repo_id", ["minivlm", "a/b/c", "jinv2/", "jinv2/mini vlm", "../minivlm", ""])
def test_a_name_that_the_hub_does_not_take_is_refused(repo_id, trained):
    with pytest.raises(ValueError):
        check(trained / "final", repo_id)


@pytest.mark.parametrize("tag", ["v 1", "-v1", "v1..2", "v1.lock", "v1~", "a/../b", "第一"])
def test_a_tag_that_git_does_not_take_is_refused(tag, trained):
    with pytest.raises(ValueError, match="tag"):
        check(trained / "final", REPO, tag)


def test_refusals_and_dry_runs_send_nothing(out, hub, client):
    (out / "final/.env").write_text("HF_TOKEN=secret")
    dry = client(out / "final", "--repo_id", REPO, "--dry_run")
    assert dry.returncode == 0, dry.stderr
    sizes = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", dry.stdout, re.M)}
    assert sizes == {str(name): (out / "final" / name).stat().st_size for name in files_of(out / "final")}
    assert {"README.md", "loss.png", "model.safetensors"} <= sizes.keys() and ".env" not in sizes
    (out / "final/optimizer.bin").touch()
    (out / "final/modeling_minivlm.py").unlink()
    refused = client(out / "final", "--repo_id", REPO)
    assert refused.returncode == 2, "every reason is named at once"
    assert "optimizer.bin" in refused.stderr and "modeling_minivlm.py" in refused.stderr
    assert not hub.requests


def test_a_checkout_goes_up_as_git_tracks_it(out):
    git = ["git", "-C", out / "final"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    (out / "final/.gitignore").write_text("runs/\n")
    subprocess.run([*git, "add", "."], check=True)
    (out / "final/runs").mkdir()
    (out / "final/runs/optimizer.bin").touch()
    (out / "final/notes.txt").touch()
    names = {str(name) for name in check(out / "final", REPO)}
    assert {".gitignore", "config.json"} <= names and not {"notes.txt", "runs/optimizer.bin"} & names


def test_a_checkout_that_git_cannot_read_is_refused(out):
    (out / "final/.git").write_text("gitdir: nowhere\n")
    with pytest.raises(ValueError, match="git cannot list its files: fatal: .*nowhere"):
        check(out / "final", REPO)


# The card


def read_card(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1]), text


def test_card_holds_what_the_run_recorded(out):
    write_card(out / "final", REPO, RUN)
    header, text = read_card(out / "final")
    assert header["pipeline_tag"] == "image-text-to-text" and header["library_name"] == "transformers"
    assert header["license"] == "apache-2.0" and header["language"] == ["en", "zh"]
    assert header["datasets"] == ["someone/pictures"]
    [model] = header["model-index"]
    found = {(r["dataset"].get("config"), m["type"]): m for r in model["results"] for m in r["metrics"]}
    expected = {(None, "exact_match"): 0.5, ("name-en", "exact_match"): 0.5, ("name-zh", "exact_match"): 0.25}
    expected["choice-en", "accuracy"] = 0.9
    assert {key: metric["value"] for key, metric in found.items()} == expected
    assert "5 of 20" in found["name-zh", "exact_match"]["name"] and "0.2993" in found[None, "exact_match"]["name"]
    assert len(ModelCard.load(out / "final/README.md").data.eval_results) == 4
    for line in (
        "| name | zh | 25.0% | 5 of 20 | 29.9% to 70.1% |",
        "| choice | en | 90.0% | 18 of 20 | 29.9% to 70.1% |",
        "| steps | 1,234 |",
        "| device | cpu (x86_64), 2 process(es) |",
        "![Loss by step](loss.png)",
        "learning_rate: 1e-3",
        "- `hub:someone/pictures`",
        "- `more.parquet`",
    ):
        assert line in text.splitlines(), line
    assert "private" not in text, "the folders of the machine are on the card"
    assert (out / "final/loss.png").read_bytes() == (out / "loss.png").read_bytes()
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "snippet", "exec")


def test_card_without_a_record_and_without_results(out):
    for name in ("run.json", "recipe.yaml", "loss.png"):
        (out / name).unlink()
    for run in (None, RUN | {"metrics": {}}):
        write_card(out / "final", REPO, run)
        header, text = read_card(out / "final")
        assert header["language"] == ["en", "zh"] and "model-index" not in header and "## Results" not in text
        assert ("## Training" in text) == ("seed: 0" in text) == bool(run)
        assert "loss.png" not in text and "private" not in text


def test_only_our_own_card_is_replaced(out):
    final = out / "final"
    write_card(final, REPO, None)
    write_card(final, REPO, RUN)
    assert "model-index" in read_card(final)[0]
    own = (final / "README.md").read_text().replace(MARKER, "") + "My own words.\n"
    (final / "README.md").write_text(own)
    write_card(final, REPO, None)
    assert (final / "README.md").read_text() == own
