# SPDX-License-Identifier: Apache-2.0
"""The Hub stand-in that `test_hub.py` relies on: it keeps what it is given, and no request leaves the machine."""

import urllib.error
import urllib.request

import pytest
from hub_server import HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


def test_a_folder_comes_back_byte_for_byte_and_a_second_commit_replaces_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {
        "README.md": b"---\nlicense: apache-2.0\npipeline_tag: audio-classification\n---\n# Tiny\n",
        "empty.txt": b"",
        "all bytes.bin": bytes(range(256)) * 40,
        "nested/deeper/grüße.json": b'{"a": 1}\r\n',
    }
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_any_token_is_accepted")

        def download(revision):
            folder = tmp_path / revision
            api.snapshot_download("me/folder", revision=revision, local_dir=folder)
            found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".cache/")}

        api.create_repo("me/folder")
        first = api.upload_folder(repo_id="me/folder", folder_path=tmp_path / "folder").oid
        assert hub.files("me/folder") == download("main") == files
        new = b'{"a": 2}\n'
        api.upload_file(repo_id="me/folder", path_in_repo="nested/deeper/grüße.json", path_or_fileobj=new)
        assert download("main") == files | {"nested/deeper/grüße.json": new}
        assert download(first) == files
        assert api.model_info("me/folder").pipeline_tag == "audio-classification"
        for error, call in (
            (RepositoryNotFoundError, lambda: api.model_info("me/none")),
            (RevisionNotFoundError, lambda: api.model_info("me/folder", revision="v9")),
            (RemoteEntryNotFoundError, lambda: api.hf_hub_download("me/folder", "none.txt")),
        ):
            with pytest.raises(error):
                call()
        assert hub.unknown_requests == []


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
