"""Checkpoints from the hub and to it: the real client against a small server of our own."""

import base64
import hashlib
import http.server
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from tests.integration.test_training import SMALL
from tests.unit.lm.conftest import small_lm

import qlip
from qlip.data.token_file import TokenFormat
from qlip.errors import InputError
from qlip.jobs.push import push
from qlip.lm.checkpoint import load as load_lm
from qlip.lm.checkpoint import save as save_lm
from qlip.model import QLIP, QLIPConfig
from qlip.model.hub import fetch
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer
from qlip.recipes.export import export, open_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden" / "cases" / "published-settings"
CONFIG = QLIPConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))
MAIN, OLD = "a" * 40, "b" * 40


class Hub:
    """A hub on loopback: what of the API the client calls for single files, and for an upload.

    Attributes:
        repos: files by repository and commit.
        closed: repositories that answer with an error code and a status.
        log: every request, as "METHOD path".
        broken: whether downloads break off halfway.
        private: repositories that are.
        messages: of the commits.
        large: bytes from which on a file goes to the large file store, by its sum.
        stored: what is there.
    """

    def __init__(self):
        self.repos, self.closed, self.log, self.broken = {}, {}, [], False
        self.private, self.messages, self.large, self.stored = set(), [], 10_000, {}
        self.branches = {"main": MAIN, "v1": OLD}
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(*hub.answer(self.path))

            def do_GET(self):
                self.answer(*hub.answer(self.path))

            def do_POST(self):
                self.answer(*hub.take(self.path, self.headers.get("Authorization"), self.body()))

            def do_PUT(self):
                hub.stored[self.path.split("/")[-1]] = self.body()
                self.answer(200, {}, b"")

            def body(self):
                if "Content-Length" in self.headers:
                    return self.rfile.read(int(self.headers["Content-Length"]))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def answer(self, status, headers, body):
                hub.log.append(f"{self.command} {self.path}")
                self.send_response(status)
                for name, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if hub.broken else body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path):
        parts = path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        if len(parts) < 4:
            return self.error(404, "EntryNotFound")
        owner, name, kind, revision, *rest = (*parts[2:], "revision", "main")[:4] if api else parts
        repo, commit = f"{owner}/{name}", self.branches.get(revision, revision)
        if repo in self.closed:
            return self.error(*self.closed[repo])
        if repo not in self.repos:
            return self.error(401, "RepoNotFound")
        if commit not in self.repos[repo]:
            return self.error(404, "RevisionNotFound")
        files = self.repos[repo][commit]
        if api and kind == "tree":
            listing = [{"type": "file", "path": k, "size": len(v), "oid": etag(v)} for k, v in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        if api and kind == "revision":
            info = {"id": repo, "sha": commit, "private": repo in self.private}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if "/".join(rest) not in files:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        body = files["/".join(rest)]
        return 200, {"ETag": f'"{etag(body)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}, body

    def take(self, path, authorization, body):
        """Answer what asks for the right to write."""
        if authorization != "Bearer writer":
            return self.error(*((403, "Forbidden") if authorization == "Bearer reader" else (401, "Unauthorized")))
        parts = path.split("?")[0].strip("/").split("/")
        if path == "/api/validate-yaml":
            return self.json({"warnings": [], "errors": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.repos else 200
            if status == 200:
                self.repos[repo] = {MAIN: {}}
                self.private |= {repo} if asked.get("visibility") == "private" else set()
            return self.json({"url": f"{self.url}/{repo}"}, status)
        if parts[-1] == "batch":
            sums = [(thing["oid"], thing["size"]) for thing in json.loads(body)["objects"]]
            href = f"{self.url}/store/"
            actions = [{"oid": s, "size": n, "actions": {"upload": {"href": href + s}}} for s, n in sums]
            return self.json({"transfer": "basic", "objects": actions})
        repo, kind, branch = "/".join(parts[2:4]), parts[4], parts[5]
        if kind == "branch":
            known = branch in self.branches
            self.branches.setdefault(branch, self.branches["main"])
            return self.error(409, "Conflict") if known else self.json({})
        files = self.repos[repo][self.branches[branch]]
        if kind == "preupload":
            modes = {f["path"]: "lfs" if f["size"] >= self.large else "regular" for f in json.loads(body)["files"]}
            return self.json(
                {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        new = {f["path"]: base64.b64decode(f["content"]) for f in values(lines, "file")}
        new |= {f["path"]: self.stored[f["oid"]] for f in values(lines, "lfsFile")}
        self.messages += [header["summary"] for header in values(lines, "header")]
        commit = etag(body)
        self.repos[repo][commit], self.branches[branch] = files | new, commit
        return self.json({"commitUrl": f"{self.url}/{repo}/commit/{commit}", "commitOid": commit})

    @staticmethod
    def json(value, status=200):
        return status, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def error(status, code, headers=None):
        return status, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}), b""


def values(lines, key):
    return [line["value"] for line in lines if line["key"] == key]


def etag(body):
    return hashlib.sha1(body).hexdigest()


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Files of a small model with everything."""
    folder = tmp_path_factory.mktemp("checkpoint")
    words = TextTokenizer.train(["a photo of a cat", "the red car"], 560, 16)
    torch.manual_seed(0)
    model = QLIP(replace(CONFIG, text=replace(CONFIG.text, vocab_size=words.vocab_size)))
    model.image_processor, model.text_tokenizer = ImageProcessor(32, 32), words
    model.save(folder)
    return files_of(folder)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A hub that has `lab/tokenizer`, and a client that knows no other and has an empty cache."""
    hub = Hub()
    hub.repos["lab/tokenizer"] = {MAIN: checkpoint | {"README.md": b"# Hello"}, OLD: checkpoint}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    patient = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.utils._http.time", patient)  # it waits before it tries again
    monkeypatch.setattr("huggingface_hub.file_download.time", patient)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.stop()


def refusal(*args, **kwargs):
    with pytest.raises(InputError) as raised:
        qlip.load(*args, **kwargs)
    text = str(raised.value)
    assert "\n" not in text
    return text


def test_loads_from_the_hub(hub):
    model = qlip.load("lab/tokenizer")
    assert model.name == "lab/tokenizer"
    assert model.image_processor == ImageProcessor(32, 32)
    assert model.text_tokenizer.vocab_size == model.config.text.vocab_size
    assert not any("README" in line for line in hub.log)
    _, *later = [line for line in hub.log if line.startswith("GET /lab/tokenizer/")]
    assert later and all(f"/{MAIN}/" in line for line in later)


def test_a_language_model_in_shards(hub, tmp_path, monkeypatch):
    llama = small_lm(0)
    save_lm(llama, tmp_path / "llama", companions={"tokenizer.json": "{}"}, shard_bytes=4000)
    hub.repos["lab/llama"] = {MAIN: files_of(tmp_path / "llama")}
    folder = fetch("lab/llama", sharded=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "tokenizer.json").exists()
    found = load_lm(folder).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in llama.state_dict().items())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("lab/llama", sharded=True) == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (fetch("lab/tokenizer", sharded=True) / "model.safetensors").exists()
    shard = sorted(path.name for path in folder.glob("model-*.safetensors"))[1]
    del hub.repos["lab/llama"][MAIN][shard]
    hub.repos["lab/other"] = hub.repos["lab/llama"]
    with pytest.raises(InputError, match=shard):
        fetch("lab/other", sharded=True)


def test_the_second_time_only_the_branch_is_looked_up(hub):
    qlip.load("lab/tokenizer")
    hub.log.clear()
    qlip.load("lab/tokenizer")
    assert hub.log == ["HEAD /lab/tokenizer/resolve/main/config.json"]


def test_all_files_are_of_one_commit(hub, checkpoint):
    """A branch that moves between two files does not mix them."""
    answer = hub.answer

    def move_after_the_first(path):
        result = answer(path)
        hub.repos["lab/tokenizer"]["c" * 40] = {"config.json": b"{}"}
        if not path.endswith("config.json"):
            hub.branches["main"] = "c" * 40
        return result

    hub.answer = move_after_the_first
    assert files_of(fetch("lab/tokenizer")) == checkpoint


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_taken(hub, revision, checkpoint):
    hub.repos["lab/tokenizer"][MAIN] = {}
    assert files_of(fetch("lab/tokenizer", revision)) == checkpoint
    assert qlip.load("lab/tokenizer", revision=revision).name == "lab/tokenizer"


def test_what_is_in_the_cache_serves_when_the_hub_is_down(hub):
    first = qlip.load("lab/tokenizer")
    hub.stop()
    second = qlip.load("lab/tokenizer")
    assert second.id_hash() == first.id_hash()
    assert second.text_tokenizer is not None and second.image_processor == first.image_processor


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "its config.json is not in the cache" in (text := refusal("lab/tokenizer"))
    assert "lab/tokenizer" in text and "unset HF_HUB_OFFLINE" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    qlip.load("lab/tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert qlip.load("lab/tokenizer").text_tokenizer is not None
    assert not hub.log


def test_offline_mode_takes_what_another_program_fetched(hub, monkeypatch):
    huggingface_hub.snapshot_download("lab/tokenizer")  # as `hf download` does: it notes no absent files
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert qlip.load("lab/tokenizer").text_tokenizer is not None


def test_offline_mode_does_not_take_half_a_checkpoint(hub, monkeypatch):
    huggingface_hub.hf_hub_download("lab/tokenizer", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "its preprocessor_config.json is not in the cache" in refusal("lab/tokenizer")


def test_the_environment_is_the_clients(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in a process of their own: the client reads them at import."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", "import qlip; print(qlip.load('lab/tokenizer').name)"]
    assert subprocess.run(command, env=env, capture_output=True, text=True).stdout == "lab/tokenizer\n"
    assert (
        tmp_path / "home" / "hub" / "models--lab--tokenizer" / "snapshots" / MAIN / "model.safetensors"
    ).exists()
    requests = len(hub.log)
    offline = subprocess.run(command, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert offline.stdout == "lab/tokenizer\n" and len(hub.log) == requests


# What is missing or forbidden


def test_no_such_repository(hub):
    text = refusal("lab/nothing")
    assert text.startswith("lab/nothing is neither a folder here nor a public repository at http://127.0.0.1")
    assert text.endswith("check the name, or run `hf auth login` if it is private")


def test_gated_repository(hub):
    hub.closed["lab/gated"] = (401, "GatedRepo")
    assert refusal("lab/gated") == (
        f"lab/gated is gated: accept its terms at {hub.url}/lab/gated, then run `hf auth login`"
    )


def test_a_token_that_does_not_do(hub):
    hub.closed["lab/private"] = (403, "Forbidden")
    text = refusal("lab/private")
    assert text.startswith(f"{hub.url} denies access to config.json of lab/private (403 Forbidden")
    assert text.endswith("run `hf auth login`")


def test_no_such_revision(hub):
    assert refusal("lab/tokenizer", revision="v9") == (
        f"lab/tokenizer has no revision 'v9': use a branch, tag or commit of {hub.url}/lab/tokenizer"
    )


def test_the_hub_cannot_be_reached(hub):
    hub.stop()
    text = refusal("lab/tokenizer")
    assert text.startswith(f"lab/tokenizer is no folder here, and {hub.url} does not give its config.json (")
    assert text.endswith("check the network, or pass a local folder")


def test_the_hub_is_out_of_order(hub):
    hub.closed["lab/tokenizer"] = (503, "Down")
    assert "503" in (text := refusal("lab/tokenizer")) and "check the network" in text


def test_not_a_hub_at_all(hub):
    """A login page of a hotel, say."""
    hub.answer = lambda path: (200, {}, b"<html>")
    assert "does not give its config.json" in refusal("lab/tokenizer")


def test_a_download_that_breaks_off_leaves_nothing_that_loads(hub, checkpoint):
    hub.broken = True
    assert "config.json of lab/tokenizer cannot be fetched" in refusal("lab/tokenizer")
    hub.broken = False
    assert files_of(fetch("lab/tokenizer")) == checkpoint


def test_no_config(hub):
    hub.repos["lab/words"] = {MAIN: {"README.md": b""}}
    assert refusal("lab/words") == "lab/words has no config.json: it is no QLIP checkpoint, or not all of one"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "weights/ema.pt"])
def test_a_pickle_is_refused(hub, checkpoint, name):
    files = {k: v for k, v in checkpoint.items() if k != "model.safetensors"}
    hub.repos["lab/pickle"] = {MAIN: files | {name: b"cos\nsystem\n"}}
    text = refusal("lab/pickle")
    assert text.startswith(f"lab/pickle has {name} and no model.safetensors: loading a pickle can run any code")
    assert not any("GET" in line and name in line for line in hub.log)


def test_no_weights(hub, checkpoint):
    hub.repos["lab/empty"] = {MAIN: {"config.json": checkpoint["config.json"]}}
    assert (
        refusal("lab/empty") == "lab/empty has no model.safetensors: it is no QLIP checkpoint, or not all of one"
    )


def test_a_full_disk(hub, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    text = refusal("lab/tokenizer")
    assert text.endswith("has no room for config.json of lab/tokenizer: free some, or set HF_HOME")


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "cache").write_text("")
    assert "config.json of lab/tokenizer cannot be fetched (" in refusal("lab/tokenizer")


def test_without_words_and_preprocessor(hub, checkpoint):
    hub.repos["lab/bare"] = {MAIN: {k: checkpoint[k] for k in ("config.json", "model.safetensors")}}
    for _ in range(2):
        model = qlip.load("lab/bare")
        assert model.image_processor is None and model.text_tokenizer is None
    hub.stop()
    assert qlip.load("lab/bare").image_processor is None


def test_the_published_b8_is_mended_from_the_hub_too(hub, tmp_path, caplog):
    vision = replace(CONFIG.vision, image_size=256, patch_size=8)
    model = QLIP(replace(CONFIG, vision=vision, decoder=vision))
    model.image_processor = ImageProcessor(resize=392, crop=256)
    model.save(tmp_path / "b8")
    hub.repos["nvidia/QLIP-B-8-256"] = {MAIN: files_of(tmp_path / "b8")}
    with caplog.at_level(logging.WARNING, "qlip"):
        assert qlip.load("nvidia/QLIP-B-8-256").image_processor == ImageProcessor(resize=256, crop=256)
    assert sum(record.name == "qlip" for record in caplog.records) == 1


# To the hub


@pytest.fixture
def writer(hub, monkeypatch):
    """The hub, for somebody who may write; without hf_xet, whose servers are others."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "writer")
    return hub


@pytest.fixture
def published(checkpoint, tmp_path):
    """A folder as `qlip publish` makes it, with something private in it."""
    folder = tmp_path / "published"
    folder.mkdir()
    papers = {name: b"{}" for name in ("results.json", "recipe.json")} | {"README.md": b"# Ours"}
    for name, body in (checkpoint | papers | {"notes.txt": b"for me", "old.safetensors": b"0"}).items():
        (folder / name).write_bytes(body)
    return folder


def refused(*args, **kwargs):
    with pytest.raises(InputError) as raised:
        push(*args, **kwargs)
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("large", [10_000, 10**9], ids=["large files apart", "all in the commit"])
def test_what_is_pushed_loads_with_the_same_ids(writer, published, checkpoint, large):
    writer.large = large
    assert push(str(published), "us/mine") == f"{writer.url}/us/mine"
    own = qlip.load(published)
    pushed = qlip.load("us/mine")
    assert pushed.id_hash() == own.id_hash()
    pixels = torch.rand(2, 3, 32, 32)
    assert pushed.tokenize(pixels).equal(own.tokenize(pixels))
    files = writer.repos["us/mine"][writer.branches["main"]]
    assert files.keys() == checkpoint.keys() | {"README.md", "results.json", "recipe.json"}
    assert files["README.md"] == b"# Ours" and writer.messages == ["Upload published"]
    assert bool(writer.stored) == (large < 10**9) and "us/mine" not in writer.private


def test_the_client_with_xet_pushes_small_files_too(writer, published, monkeypatch):
    """With hf_xet it takes another way through its code; only large files go to Xet's servers."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    writer.large = 10**9
    push(str(published), "us/mine")
    assert qlip.load("us/mine").id_hash() == qlip.load(published).id_hash() and len(writer.messages) == 1


def test_a_second_push_and_a_branch(writer, published):
    push(str(published), "us/mine", private=True)
    assert "us/mine" in writer.private
    (published / "README.md").write_text("# Better")
    url = push(str(published), "us/mine", revision="v2", message="Mend the card")
    assert url == f"{writer.url}/us/mine/tree/v2" and writer.messages[-1] == "Mend the card"
    repo = writer.repos["us/mine"]
    assert repo[writer.branches["v2"]]["README.md"] == b"# Better"
    assert repo[writer.branches["main"]]["README.md"] == b"# Ours"
    push(str(published), "us/mine", private=True)
    assert qlip.load("us/mine", revision="v2").id_hash() == qlip.load(published).id_hash()


def test_a_public_repository_does_not_become_private_unseen(writer, published):
    push(str(published), "us/mine")
    assert refused(str(published), "us/mine", private=True).startswith("us/mine is there already and public")
    assert len(writer.messages) == 1


def test_what_is_no_published_tokenizer_is_not_pushed(writer, published):
    (published / "README.md").unlink()
    assert "has no model card (README.md): `qlip publish` and `qlip export`" in refused(str(published), "us/mine")
    (published / "model.safetensors").write_bytes(b"half")
    assert "not a whole safetensors file" in refused(str(published), "us/mine")
    text = refused("nowhere", "us/mine")
    assert text == "'nowhere' is not here: push a folder, or a bundled tokenizer (qlip-tiny)"
    assert "us/mine" not in writer.repos


def test_who_may_not_write(writer, published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "reader")
    text = refused(str(published), "us/mine")
    assert text.startswith(f"{writer.url} does not let you write to us/mine (") and "403" in text
    monkeypatch.setenv("HF_TOKEN", "forged")
    assert refused(str(published), "us/mine").startswith(f"{writer.url} does not know your token (")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    text = refused(str(published), "us/mine")
    assert text == f"you have no token of {writer.url}: run `hf auth login`, or set HF_TOKEN"


def test_a_name_that_is_none(writer, published):
    assert refused(str(published), "mine") == "'mine' is no name for a repository: use owner/name"
    assert refused(str(published), "us/mi ne").startswith("'us/mi ne' is no name for a repository (")


def test_pushing_without_a_hub(writer, published, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "in offline mode: unset HF_HUB_OFFLINE" in refused(str(published), "us/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    writer.stop()
    text = refused(str(published), "us/mine")
    assert text.startswith(f"us/mine cannot be uploaded to {writer.url} (") and "check the network" in text


def test_what_export_wrote_is_pushed(writer, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, body in checkpoint.items():
        (tmp_path / "mine" / name).write_bytes(body)
    model, _ = open_tokenizer(str(tmp_path / "mine"))
    export(model, tmp_path / "exported")
    push(str(tmp_path / "exported"), "us/mine")
    card = writer.repos["us/mine"][writer.branches["main"]]["README.md"].decode()
    assert card.startswith("---\nlicense: other\n") and 'qlip.load("exported")' in card
    assert qlip.load("us/mine").id_hash() == model.id_hash()
    (tmp_path / "exported" / "README.md").write_text("# Mine")
    export(model, tmp_path / "exported")
    assert (tmp_path / "exported" / "README.md").read_text() == "# Mine"


def test_from_a_run_to_the_hub_by_the_commands(writer, run, color_data, tmp_path):
    """README's `tokens verify`, `export` and `push`, and `publish`, one after the other."""
    train, val, classes = (color_data / name for name in ("train.parquet", "val.parquet", "classes.json"))
    words = ["--data.train", train, "--data.classes", classes]
    cards = []
    for command in (
        ["train", "tiny", *words, *SMALL, "--steps", 1, "--warmup-steps", 0, "--out", "run"],
        ["tokenize", train, "--model", "run/model", "--out", "tokens.parquet", "--num-workers", 0],
        ["tokens", "verify", "tokens.parquet"],
        ["export", "run", "--out", "mine"],
        ["push", "mine", "us/mine"],
        ["publish", "run", "--name", "ours", "--out", "published", "--val", val, "--classes", classes],
        ["push", "published", "us/mine"],
    ):
        code, _, err = run(*command)
        assert code == 0, err
        if command[0] == "push":
            cards.append(writer.repos["us/mine"][writer.branches["main"]]["README.md"].decode())
    assert "not measured" in cards[0] and "# ours" in cards[1] and "zero-shot top-1" in cards[1]
    ids = TokenFormat.read(Path("tokens.parquet")).id_hash
    assert qlip.load("run/model").id_hash() == qlip.load("mine").id_hash() == ids
    assert qlip.load("us/mine").id_hash() == qlip.load("published").id_hash() != ids  # whose weights are bfloat16
