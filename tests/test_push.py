"""What a push sends to the hub and what it refuses, against a small server that speaks its protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lora_dpo.errors import RunError, UserError
from lora_dpo.export.push import own_files, push
from lora_dpo.training import Display

KNOWN = ("/api/models/", "/api/repos/create", "/api/validate-yaml")
TOKEN = "hf_" + "Abc123Def456Ghi789" * 2


class Lines(Display):
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@dataclass
class Hub:
    """Repositories by name, and what was asked of them. broken: what an action is answered with instead."""

    address: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    broken: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON) of a request."""
        if not path.startswith(KNOWN):  # what the library asks for itself
            return 404, {}, {}
        action, repository = self._action(path)
        self.asked.append(f"{method} {action}")
        if action in self.broken:
            return *self.broken[action], {}
        if action == "create":
            return self._create(json.loads(body))
        if action == "validate-yaml":
            return 200, {}, {"errors": [], "warnings": []}
        if repository not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        if action == "preupload":
            names = [item["path"] for item in json.loads(body)["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return 200, {}, {"files": modes}
        if action == "commit":
            return self._commit(repository, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": name} for name in sorted(self.files[repository])]
        return 200, {}, {"id": repository, "private": self.private[repository], "siblings": siblings}

    def _action(self, path: str) -> tuple[str, str]:
        parts = path.partition("?")[0].strip("/").split("/")[1:]  # after api/
        if parts[0] == "repos":
            return "create", ""
        if parts[0] == "validate-yaml":
            return parts[0], ""
        return (parts[3] if len(parts) > 3 else "info"), "/".join(parts[1:3])

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.address}/{name}"}
        if name in self.files:
            return 409, {}, url
        self.files[name], self.private[name] = {".gitattributes": b""}, wanted["visibility"] == "private"
        return 200, {}, url

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, str], Any]:
        self.commits.append(lines)
        for line in lines:
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.files[repository][line["value"]["path"]] = content
        url = f"{self.address}/{repository}/commit/{'0' * 40}"
        return 200, {}, {"commitUrl": url, "commitOid": "0" * 40}


def serve(hub: Hub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.path.startswith(KNOWN):
                hub.tokens.add(self.headers.get("Authorization"))
            status, headers, values = hub.answer(self.command, self.path, self.rfile.read(length))
            text = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub()
    server = serve(hub)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export-adapter"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# card\n")
    (folder / "adapter_config.json").write_text('{"r": 4}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(100)))
    (folder / "more" / "notes.txt").write_text("inner")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in own_files(folder)}


def test_a_new_repository_is_private_and_gets_exactly_the_folders_files(hub: Hub, exported: Path):
    (exported.parent / "secret.txt").write_text("not this")
    before = contents(exported)
    url = push(exported, "me/mine", display=Lines())
    assert url == f"{hub.address}/me/mine"
    assert hub.private["me/mine"]
    assert hub.files["me/mine"] == {".gitattributes": b"", **before}
    assert contents(exported) == before
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert {line["key"] for commit in hub.commits for line in commit} == {"header", "file"}


def test_a_new_repository_is_public_where_that_is_asked_for(hub: Hub, exported: Path):
    push(exported, "me/mine", public=True, display=Lines())
    assert not hub.private["me/mine"]


def test_what_is_replaced_is_said_and_nothing_else_is_touched(hub: Hub, exported: Path):
    hub.files["me/mine"] = {"README.md": b"old", "notes.md": b"kept", "adapter_model.safetensors": b"old"}
    hub.private["me/mine"] = True
    display = Lines()
    push(exported, "me/mine", display=display)
    assert hub.files["me/mine"] == {"notes.md": b"kept", **contents(exported)}
    said = [line for line in display.lines if "replaced" in line]
    assert len(said) == 1
    assert "README.md" in said[0] and "adapter_model.safetensors" in said[0] and "notes.md" not in said[0]


def test_weights_of_another_model_are_not_mixed_with_these(hub: Hub, exported: Path):
    hub.files["me/mine"] = {"model-00001-of-00002.safetensors": b"other", "config.json": b"{}"}
    hub.private["me/mine"] = True
    with pytest.raises(RunError, match=r"model-00001-of-00002\.safetensors.*another repository"):
        push(exported, "me/mine", display=Lines())
    assert hub.asked == ["GET info"]


def test_a_public_repository_takes_nothing_unless_that_is_meant(hub: Hub, exported: Path):
    hub.files["me/mine"], hub.private["me/mine"] = {}, False
    with pytest.raises(RunError, match="public"):
        push(exported, "me/mine", display=Lines())
    assert hub.files["me/mine"] == {}
    push(exported, "me/mine", public=True, display=Lines())
    assert hub.files["me/mine"] == contents(exported)


def test_a_private_repository_stays_so_and_that_is_said(hub: Hub, exported: Path):
    hub.files["me/mine"], hub.private["me/mine"] = {}, True
    display = Lines()
    push(exported, "me/mine", public=True, display=display)
    assert hub.private["me/mine"]
    assert any("private and stays so" in line for line in display.lines)


@pytest.mark.parametrize(
    "name", ["mine", "a/b/c", "me/", "/mine", "me/mi ne", "me/..", "me/x--y", "me/x.git", ""]
)
def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub: Hub, exported: Path, name: str):
    with pytest.raises(RunError, match="user/name") as error:
        push(exported, name, display=Lines())
    assert "repo_type" not in str(error.value), "an option of the hub's library, not of this command"
    assert hub.asked == []


def test_without_a_token_nothing_is_asked_and_the_way_to_one_is_said(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RunError, match=r"hf auth login.*HF_TOKEN"):
        push(exported, "me/mine", display=Lines())
    assert hub.asked == []


def test_offline_mode_is_named(hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="HF_HUB_OFFLINE"):
        push(exported, "me/mine", display=Lines())
    assert hub.asked == []


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        ("create", 403, "403; the token may not write there; no rights"),
        ("info", 401, "401; it does not know"),
    ],
)
def test_what_the_hub_refuses_is_said_without_the_token(
    hub: Hub, exported: Path, action: str, status: int, said: str
):
    message = {401: "Invalid credentials in Authorization header", 403: f"no rights for {TOKEN}"}[status]
    hub.broken[action] = (status, {"X-Error-Message": message})
    before = contents(exported)
    with pytest.raises(UserError) as caught:
        push(exported, "me/mine", display=Lines())
    assert said in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(exported) == before
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_a_line_and_the_folder_stays(
    hub: Hub, exported: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    before = contents(exported)
    with pytest.raises(RunError, match=r"not pushed to me/mine: ConnectError: .*[Cc]onnection"):
        push(exported, "me/mine", display=Lines())
    assert contents(exported) == before


def test_a_link_that_leads_out_of_the_folder_is_not_followed(hub: Hub, exported: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("key")
    (exported / "more" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RunError, match="more/link"):
        push(exported, "me/mine", display=Lines())
    assert hub.asked == []


def test_an_empty_or_missing_folder_is_refused(hub: Hub, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(RunError, match="no files"):
            push(tmp_path / name, "me/mine", display=Lines())
    assert hub.asked == []


def test_paths_of_this_machine_in_what_is_uploaded_are_said(hub: Hub, exported: Path, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    config = {"base_model_name_or_path": str(base), "target_modules": ["/not/there"]}
    (exported / "adapter_config.json").write_text(json.dumps(config))
    display = Lines()
    push(exported, "me/mine", display=display)
    assert [line for line in display.lines if line.startswith("note")] == [
        f"note: adapter_config.json names {base}, a path of this machine, and is uploaded as it is"
    ]
