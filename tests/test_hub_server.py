# SPDX-License-Identifier: Apache-2.0
"""The Hub stand-in seen through its real clients (huggingface_hub, transformers, datasets) in fresh processes."""

import json
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request

import pytest
from hub_server import HubServer


@pytest.fixture
def hub():
    """A server that must have understood every request by the end of the test."""
    with HubServer() as server:
        yield server
    assert server.unknown_requests == []


def run_client(hub: HubServer, home, code: str, *arguments: object) -> object:
    """Run Python code in a fresh process that knows only this Hub; return the JSON of its last line of output."""
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=hub.environment(home) | {"OMP_NUM_THREADS": "1"},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


UPLOAD = """
    import json, sys
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo(sys.argv[1], exist_ok=True)
    commit = api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
    print(json.dumps(commit.oid))
"""

SNAPSHOT = """
    import json, pathlib, sys
    from huggingface_hub import snapshot_download
    root = pathlib.Path(snapshot_download(sys.argv[1], revision=sys.argv[2]))
    print(json.dumps({p.relative_to(root).as_posix(): p.read_bytes().hex() for p in root.rglob("*") if p.is_file()}))
"""


def test_a_folder_comes_back_byte_for_byte_and_a_second_commit_replaces_a_file(hub, tmp_path):
    files = {
        "README.md": b"---\nlicense: apache-2.0\npipeline_tag: audio-classification\n---\n# Tiny\n",
        "empty.txt": b"",
        "all bytes.bin": bytes(range(256)) * 40,
        "nested/deeper/grüße.json": b'{"a": 1}\r\n',
    }
    folder = tmp_path / "folder"
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    first = run_client(hub, tmp_path / "writer", UPLOAD, "me/folder", folder)
    assert hub.files("me/folder") == files
    served = run_client(hub, tmp_path / "reader", SNAPSHOT, "me/folder", "main")
    assert {path: bytes.fromhex(content) for path, content in served.items()} == files

    changed = files | {"nested/deeper/grüße.json": b'{"a": 2}\n'}
    (folder / "nested/deeper/grüße.json").write_bytes(changed["nested/deeper/grüße.json"])
    second = run_client(hub, tmp_path / "writer", UPLOAD, "me/folder", folder)
    assert second != first
    # the same reader, whose cache holds the first commit, sees the new file; the first commit is still there by its id
    served = run_client(hub, tmp_path / "reader", SNAPSHOT, "me/folder", "main")
    assert {path: bytes.fromhex(content) for path, content in served.items()} == changed
    served = run_client(hub, tmp_path / "another", SNAPSHOT, "me/folder", first)
    assert {path: bytes.fromhex(content) for path, content in served.items()} == files


def test_api_listing_deletion_and_errors(hub, tmp_path):
    result = run_client(
        hub,
        tmp_path / "home",
        """
        import json
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
        from huggingface_hub.errors import RevisionNotFoundError
        api, result = HfApi(), {}
        card = b"---\\nlibrary_name: transformers\\npipeline_tag: audio-classification\\n---\\n"
        result["url"] = api.create_repo("tiny")
        for path, content in {"README.md": card, "a/b/c.txt": b"0123456789", "a/d.txt": b"d", "old/e": b"e"}.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="me/tiny")
        api.delete_file("a/d.txt", "me/tiny")
        api.delete_folder("old", "me/tiny")
        info = api.model_info("me/tiny")
        result["user"] = api.whoami()["name"]
        result["info"] = [info.library_name, info.pipeline_tag, [file.rfilename for file in info.siblings]]
        result["main is head"] = api.list_repo_refs("me/tiny").branches[0].target_commit == info.sha
        result["top"] = sorted(item.path for item in api.list_repo_tree("me/tiny"))
        result["inside"] = sorted(item.path for item in api.list_repo_tree("me/tiny", "a", recursive=True))
        result["paths"] = [item.path for item in api.get_paths_info("me/tiny", ["a/b/c.txt", "a/b", "none"])]
        with HfFileSystem().open("me/tiny/a/b/c.txt", block_size=4) as file:
            file.seek(3)
            result["range"] = file.read(2).decode()
        calls = {
            "repository": lambda: api.model_info("me/none"),
            "revision": lambda: api.model_info("me/tiny", revision="v9"),
            "file": lambda: api.hf_hub_download("me/tiny", "none.txt"),
            "folder": lambda: list(api.list_repo_tree("me/tiny", "none")),
            "twice": lambda: api.create_repo("tiny"),
        }
        for name, call in calls.items():
            try:
                call()
            except (EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError) as error:
                result[name] = type(error).__name__
        print(json.dumps(result))
        """,
    )
    assert result == {
        "url": f"{hub.endpoint}/me/tiny",
        "user": "me",
        "info": ["transformers", "audio-classification", ["README.md", "a/b/c.txt"]],
        "main is head": True,
        "top": ["README.md", "a"],
        "inside": ["a/b", "a/b/c.txt"],
        "paths": ["a/b/c.txt", "a/b"],
        "range": "34",
        "repository": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "folder": "RemoteEntryNotFoundError",
        "twice": "HfHubHTTPError",
    }


def test_a_model_is_pushed_and_loaded_in_another_process(hub, tmp_path):
    checksum = """
    import json
    def checksum(model):
        print(json.dumps({name: value.double().sum().item() for name, value in model.state_dict().items()}))
    """
    pushed = run_client(
        hub,
        tmp_path / "writer",
        checksum
        + """
    from transformers import BertConfig, BertModel
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertModel(config)
    model.push_to_hub("me/tiny")
    checksum(model)
    """,
    )
    loaded = run_client(
        hub,
        tmp_path / "reader",
        checksum
        + """
    from transformers import AutoModel
    checksum(AutoModel.from_pretrained("me/tiny"))
    """,
    )
    assert loaded == pushed
    assert len(pushed) > 10
    assert {"config.json", "model.safetensors"} <= set(hub.files("me/tiny"))


def test_a_csv_data_set_loads_streaming_and_not(hub, tmp_path):
    (tmp_path / "train.csv").write_text("path,text,label\na.flac,hello,happy\nb.flac,,sad\n")
    rows = run_client(
        hub,
        tmp_path / "home",
        """
        import json, sys
        from datasets import load_dataset
        from huggingface_hub import HfApi
        api = HfApi()
        api.create_repo("me/data", repo_type="dataset")
        api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="train.csv", repo_id="me/data", repo_type="dataset")
        streamed = list(load_dataset("me/data", split="train", streaming=True))
        print(json.dumps([streamed, load_dataset("me/data", split="train").to_list()]))
        """,
        tmp_path / "train.csv",
    )
    expected = [
        {"path": "a.flac", "text": "hello", "label": "happy"},
        {"path": "b.flac", "text": None, "label": "sad"},
    ]
    assert rows == [expected, expected]
    assert list(hub.files("me/data", "dataset")) == ["train.csv"]


def test_unknown_routes_and_other_hosts_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with HubServer() as hub:
        environment = hub.environment(tmp_path)
        assert "HF_HUB_OFFLINE" not in environment
        assert "http_proxy" not in environment
        assert hub.server_address[0] == "127.0.0.1"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            opener.open(hub.endpoint + "/api/nothing", timeout=5)
        proxies = {"http": environment["HTTP_PROXY"], "https": environment["HTTPS_PROXY"]}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            opener.open("http://example.invalid/api/whoami-v2", timeout=5)
        with pytest.raises(urllib.error.URLError):
            opener.open("https://example.invalid/", timeout=5)
        assert hub.unknown_requests == [
            "GET /api/nothing",
            "GET http://example.invalid/api/whoami-v2",
            "CONNECT example.invalid:443",
        ]
