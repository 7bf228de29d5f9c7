"""Uploads that fail: every failure ends in one clear message, or is waited out; no message holds the token."""

import json
import re
import shlex
import textwrap

import pytest

from helpers.hub_server import Fault
from helpers.release import COMMAND, PATIENCE, REPO, TOKEN, assert_published, digests, naps
from minivlm.hub.retries import WAITS
from minivlm.hub.secrets import scrub

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
    assert done.returncode == 2 and not naps(done) and len(hub.asked(endpoint)) == 1
    told = done.stderr[re.search("^error: ", done.stderr, re.MULTILINE).start() :]
    assert all(word in told for word in [REPO, "is not uploaded", *words]), told
    assert "Traceback" not in done.stderr
    assert digests(out) == before
    command = shlex.split(re.search("^    (minivlm publish .*)$", told, re.MULTILINE)[1])
    assert command[2:4] == [str(out / "final"), "--repo_id"]
    assert client(*command[2:]).returncode == 0
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
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr
    assert naps(done) == (list(WAITS) if "ConnectError" in words else [])


def test_a_namespace_of_somebody_else(out, client):
    done = client(out / "final", "--repo_id", "google/minivlm")
    assert done.returncode == 2 and "not enough rights in 'google'" in done.stderr


def test_the_token_of_hf_auth_login_is_found(out, hub, client, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(TOKEN)
    hub.fail("commit", Fault(403, body=ECHO))
    assert client(out / "final", "--repo_id", REPO, HF_TOKEN="").returncode == 2
    assert client(out / "final", "--repo_id", REPO, HF_TOKEN="").returncode == 0
    assert_published(hub, out / "final")


def test_the_traceback_of_a_failure_holds_no_token(out, hub, client):
    hub.fail("create", Fault(403, body=ECHO))
    done = client(out / "final", REPO, code=PATIENCE + "publish.publish(*sys.argv[1:])")
    assert done.returncode == 1 and "publish.ReleaseError: " in done.stderr and "Bearer ***" in done.stderr


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
    code = PATIENCE + "retries.TIMEOUT = 1.0\n" + COMMAND
    done = client(out / "final", "--repo_id", REPO, code=code)
    assert done.returncode == 0 and naps(done) == [1] and "ReadTimeout" in done.stderr, done.stderr


@pytest.mark.parametrize("endpoint, tries", [("commit", 1 + len(WAITS)), ("preupload", 6)])
def test_a_failure_that_does_not_pass_ends_after_a_few_tries(endpoint, tries, out, hub, client):
    """huggingface_hub tries preupload six times itself: our tries must not multiply with these."""
    hub.fail(endpoint, *[503] * 50)
    done = client(out / "final", "--repo_id", REPO)
    assert done.returncode == 2 and len(hub.asked(endpoint)) == tries
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
    push = BackgroundPush()
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
