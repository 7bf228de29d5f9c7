"""Publishing on a Hub of our own on loopback: what goes up loads again, and whatever fails ends in one clear sentence.

HF_ENDPOINT is read when huggingface_hub is imported, so clients are processes of their own. In them `time.sleep` is
recorded and returns at once, and huggingface_hub logs all that it can, which the token must not be part of.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from hub_server import Fault, HubServer
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, make_model, make_pixels, make_processor, make_prompt, same

from scripts.model_card import MARKER, scrub, write_card
from scripts.release import WAITS, check, files_of

REPO = "jinv2/minivlm"
TOKEN = "hf_" + "NotARealToken" * 2  # in two parts, or scanners for leaked secrets report this file
CELL = {"match": 0.5, "hits": 10, "count": 20, "low": 0.2993, "high": 0.7007}
RUN = {
    "options": {
        "data": ["data/train.parquet", "hub:someone/pictures", "/data/private/more.parquet"],
        "eval_data": ["data/test.parquet"],
        "learning_rate": 0.001,
        "seed": 0,
        "output_dir": "/data/private/out",
    },
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "commit": "0123456789ab",
    "device": "cpu (x86_64)",
    "processes": 2,
    "precision": "bf16",
    "metrics": {
        "overall": CELL,
        "tasks": {"name": {"en": CELL, "zh": CELL | {"match": 0.25, "hits": 5}}},
        "ranked": {"choice": {"en": CELL | {"match": 0.9, "hits": 18}}},
    },
    "steps": 1234,
    "tokens": 56789,
    "seconds": 90.0,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as a training run leaves it."""
    out = tmp_path_factory.mktemp("a run")
    make_model(text={"vocab_size": 6400}).save_pretrained(out / "final")
    make_processor().save_pretrained(out / "final")
    (out / "run.json").write_text(json.dumps(RUN))
    (out / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (out / "recipe.yaml").write_text("data: [/data/private/more.parquet]\nlearning_rate: 1e-3\n")
    Image.new("RGB", (8, 8)).save(out / "loss.png")
    return out


@pytest.fixture
def out(trained, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(trained, tmp_path / "a run")


@pytest.fixture
def hub():
    with HubServer(TOKEN) as server:
        yield server


PATIENCE = """
import json, sys, time
naps, sleep = [], time.sleep
time.sleep = lambda seconds: (naps.append(seconds), sleep(min(seconds, 0.01)))
from scripts import release
"""
COMMAND = "sys.argv[0] = 'release'\ntry:\n    release.main()\nfinally:\n    print('naps', naps)"


@pytest.fixture
def client(hub, tmp_path):
    """`client(*arguments)`: the command line in a process of its own; `code` and environment may be others.

    Whatever it prints and whatever lies on the disk afterwards is searched for the token.
    """
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    fresh |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "HF_DEBUG": "1"}

    def run(*arguments, code=PATIENCE + COMMAND, cwd=ROOT, **environment):
        environment = fresh | {"HF_TOKEN": TOKEN} | environment
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        sent = environment["HF_TOKEN"] or TOKEN
        assert sent not in done.stdout + done.stderr
        files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
        assert not [path for path in files if sent.encode() in path.read_bytes()]
        assert sent not in repr(hub.requests)
        return done

    return run


def naps(done):
    return json.loads(re.search(r"^naps (.*)$", done.stdout, re.MULTILINE)[1])


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("README.md", "loss.png")
    }


def assert_published(hub, folder, commits=1):
    repo = hub.repos[REPO]
    assert len(repo.commits) == 1 + commits  # the first one made the repository
    for name in files_of(folder):
        assert repo.files[name.as_posix()] == (folder / name).read_bytes(), name


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
    assert third.returncode == 1 and "is uploaded" in third.stderr and "names another commit" in third.stderr


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
    assert "private" not in text, "folders of the machine are nobody's business"
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


# Failures that stay


ECHO = '{"error": "no entry for {authorization}"}'
PERMANENT = {
    "create 401": ("create", 401, ["401", "`hf auth login`", "write access"]),
    "create 403": ("create", Fault(403, body=ECHO), ["403", "'jinv2'", "--repo_id", "no entry for Bearer ***"]),
    "preupload 403": ("preupload", 403, [f"403 Forbidden (POST /api/models/{REPO}/preupload/main): made to fail"]),
    "commit 413": ("commit", 413, ["413", "too large", "max_shard_size"]),
    "put 403": ("put", Fault(403, body="<html>signature</html>"), ["403 Forbidden (PUT /storage/", "write access"]),
    "yaml 400": ("yaml", Fault(400, body='{"errors": [{"message": "license is wrong"}]}'), ["license is wrong"]),
    "commit 429": ("commit", Fault(429, headers={"Retry-After": "3600"}), ["429", "3600 s"]),
    "commit RateLimit": ("commit", Fault(429, headers={"RateLimit": '"api";r=0;t=900'}), ["900 s"]),
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_failure_that_stays_ends_at_once_and_the_printed_command_goes_on(fault, out, hub, client):
    endpoint, answer, words = PERMANENT[fault]
    before = digests(out)
    hub.fail(endpoint, answer)
    done = client(out / "final", "--repo_id", REPO, "--private", "--tag", "v1")
    assert done.returncode == 1 and not naps(done) and len(hub.asked(endpoint)) == 1
    told = done.stderr[done.stderr.index("python -m scripts.release: ") :]
    assert all(word in told for word in [REPO, "is not uploaded", *words]), told
    assert "Traceback" not in done.stderr
    assert digests(out) == before
    command = shlex.split(re.search("^    (python -m .*)$", told, re.MULTILINE)[1])
    assert command[:5] == ["python", "-m", "scripts.release", str(out / "final"), "--repo_id"]
    assert client(*command[3:]).returncode == 0
    assert_published(hub, out / "final")
    assert hub.repos[REPO].private and list(hub.repos[REPO].tags) == ["v1"]


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"HF_TOKEN": ""}, ["401", "no token on this machine"]),
        ({"HF_TOKEN": "eyJ.some.other.kind"}, ["401", "was refused"]),
        ({"HF_HUB_OFFLINE": "1"}, ["Unset HF_HUB_OFFLINE"]),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, ["ConnectError", "look at your network"]),
    ],
    ids=["no token", "wrong token", "offline", "no network"],
)
def test_what_is_wrong_on_this_side_is_told_apart(environment, words, out, hub, client):
    done = client(out / "final", "--repo_id", REPO, **environment)
    assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
    assert naps(done) == (list(WAITS) if "ConnectError" in words else [])


def test_a_namespace_of_somebody_else(out, client):
    done = client(out / "final", "--repo_id", "google/minivlm")
    assert done.returncode == 1 and "not enough rights in 'google'" in done.stderr


def test_the_token_of_hf_auth_login_is_found(out, hub, client, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(TOKEN)
    hub.fail("commit", Fault(403, body=ECHO))
    assert client(out / "final", "--repo_id", REPO, HF_TOKEN="").returncode == 1
    assert client(out / "final", "--repo_id", REPO, HF_TOKEN="").returncode == 0
    assert_published(hub, out / "final")


def test_the_traceback_of_a_failure_holds_no_token(out, hub, client):
    hub.fail("create", Fault(403, body=ECHO))
    done = client(out / "final", REPO, code=PATIENCE + "release.publish(*sys.argv[1:])")
    assert done.returncode == 1 and "release.ReleaseError: " in done.stderr and "Bearer ***" in done.stderr


# Failures that pass


GATEWAY = Fault(502, body="<html>Bad Gateway</html>")
BUSY = Fault(429, headers={"Retry-After": "7"})
PASSING = {  # where, what, seconds waited: our own, or those of huggingface_hub, which adds one to Retry-After
    "create": ("create", [500, 500], [1, 4]),
    "commit": ("commit", [BUSY, 409, 412, GATEWAY], [7, 4, 16, 60]),
    "commit RateLimit": ("commit", [Fault(429, headers={"RateLimit": '"api";r=0;t=55'})], [55]),
    "validation": ("yaml", [GATEWAY, Fault(429, body="slow down", headers={"Retry-After": "9"}), 500], [1, 4, 16]),
    "preupload": ("preupload", [500, 500, BUSY], [1, 2, 8]),
    "lfs": ("lfs", [503], [1]),
    "put": ("put", [500, 500], [1, 2]),
    "cut": ("put", [Fault(cut_after=100_000), Fault(cut_after=100_000)], [1, 2]),
    "cut commit": ("commit", [Fault(cut_after=1000)], [1]),
    "tag": ("tag", [500, Fault(lost=True)], [1, 4]),
    "tag reading": ("info", [500], [1]),
    "lost answer": ("commit", [Fault(lost=True)], [1]),
}


@pytest.mark.parametrize("case", PASSING)
def test_a_failure_that_passes_is_waited_out(case, out, hub, client):
    endpoint, faults, waited = PASSING[case]
    hub.fail(endpoint, *faults)
    done = client(out / "final", "--repo_id", REPO, "--tag", "v1")
    assert done.returncode == 0, done.stderr
    assert naps(done) == waited
    assert_published(hub, out / "final")
    assert hub.repos[REPO].tags == {"v1": hub.repos[REPO].commits[-1][0]}
    assert len(hub.asked("put")) == 1 + (len(faults) if endpoint == "put" else 0), "weights were sent again"


def test_a_dead_connection_is_given_up(out, hub, client):
    hub.fail("commit", Fault(hang=30.0))
    code = PATIENCE + "release.TIMEOUT = 1.0\n" + COMMAND
    done = client(out / "final", "--repo_id", REPO, code=code)
    assert done.returncode == 0 and naps(done) == [1] and "ReadTimeout" in done.stderr, done.stderr


@pytest.mark.parametrize("endpoint, tries", [("commit", 1 + len(WAITS)), ("preupload", 6)])
def test_a_failure_that_does_not_pass_ends_after_a_few_tries(endpoint, tries, out, hub, client):
    """huggingface_hub tries preupload six times itself: our tries must not multiply with these."""
    hub.fail(endpoint, *[503] * 50)
    done = client(out / "final", "--repo_id", REPO)
    assert done.returncode == 1 and len(hub.asked(endpoint)) == tries
    assert "503" in done.stderr and "status page" in done.stderr


def test_what_somebody_committed_meanwhile_is_not_mistaken_for_ours(out, hub, client):
    """The first try found config.json unchanged; the second must look again."""
    assert client(out / "final", "--repo_id", REPO).returncode == 0
    (out / "final/generation_config.json").write_text('{"max_new_tokens": 5}\n')
    code = f"""
    from huggingface_hub import HfApi
    real = HfApi.create_commit
    def meanwhile(api, *args, **kwargs):
        HfApi.create_commit = real
        try:
            return real(api, *args, **kwargs)
        finally:
            api.upload_file(path_or_fileobj=b"{{}}", path_in_repo="config.json", repo_id="{REPO}")
    HfApi.create_commit = meanwhile
    """
    hub.fail("commit", 412)
    done = client(out / "final", "--repo_id", REPO, code=PATIENCE + textwrap.dedent(code) + COMMAND)
    assert done.returncode == 0, done.stderr
    assert_published(hub, out / "final", commits=3)


# While training


def test_background_push_uploads_the_newest_and_never_raises(out, hub, client, tmp_path):
    code = """
    import shutil
    from pathlib import Path
    out, repo = Path(sys.argv[1]), "jinv2/minivlm"
    push = release.BackgroundPush()
    assert push.finish()
    for name in ("one", "two", "three"):  # the server holds the first one up, so the second is replaced
        shutil.copytree(out / "final", out / name)
        (out / name / "step.txt").write_text(name)
        push.submit(out / name, repo, message=name)
        shutil.rmtree(out / name)  # as a new checkpoint replaces the old one
        sleep(0.2)
    assert push.finish() and push.failures == [], push.failures
    push.submit(out / "final", "google/minivlm")
    assert not push.finish() and len(push.failures) == 1
    (out / "final/step.txt").write_text("four")
    push.submit(out / "final", repo, message="four")
    assert push.finish() and len(push.failures) == 1
    push.submit(out / "nowhere", repo)
    push.submit(out / "final", repo, colour="red")
    assert not push.finish()
    push.submit(out, repo)
    assert not push.finish()
    print(json.dumps(push.failures))
    """
    hub.fail("create", Fault(hang=1.5))
    done = client(out, code=PATIENCE + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    messages = [message for _, message, _ in hub.repos[REPO].commits]
    assert messages == ["initial commit", "one", "three", "four"]
    assert [files["step.txt"] for _, _, files in hub.repos[REPO].commits[1:]] == [b"one", b"three", b"four"]
    assert b"1,234" in hub.repos[REPO].files["README.md"], "run.json is found beside the folder that was named"
    failures = json.loads(done.stdout.splitlines()[-1])
    for failure, words in zip(
        failures,
        [
            ["403", f"'{out / 'final'}' --repo_id google/minivlm"],
            ["nowhere"],
            ["TypeError", "colour"],
            ["config.json"],
        ],
        strict=True,
    ):
        assert all(word in failure for word in words), failure
        assert f"warning: {failure}" in done.stderr and ".push-" not in failure
    assert sorted(path.name for path in out.iterdir()) == ["final", "log.jsonl", "loss.png", "recipe.yaml", "run.json"]


def test_a_token_of_any_form_is_scrubbed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-a-company's-own-server")
    assert (
        scrub("asked with of-a-company's-own-server, Bearer abc and hf_" + "a" * 30)
        == "asked with ***, Bearer *** and ***"
    )
