"""The Hub's model repositories: what its real client needs to create, upload, commit, tag and read."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from tests.gptcore.hub_server import Handler

ROLES = {"hf_writes": "write", "hf_reads": "read"}
LFS = (".safetensors", ".png")


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("0" * 40, {})])  # oid, files
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        wanted = self.tags.get(revision, revision)
        return next((c for c in reversed(self.commits) if c[0] == wanted), self.commits[-1])


class ModelHub(Handler):
    """State is the class's: a test makes a subclass of its own."""

    repos: dict[str, Repo]
    objects: dict[str, bytes]
    statuses: list[int]  # answers to the next uploads and commits, before they are taken
    commit_statuses: list[int]  # the same of commits alone, which the client does not try again by itself
    hold: threading.Event  # uploads of large files wait for it
    requests: list[str]

    def do_GET(self) -> None:
        parts = self.parts()
        if parts[:2] == ["api", "whoami-v2"]:
            role = ROLES.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            return self.send_json(
                {"name": "me", "auth": {"accessToken": {"role": role}}} if role else {}, 200 if role else 401
            )
        if parts[:2] == ["api", "models"]:
            repo = self.repos.get("/".join(parts[2:4]))
            if repo is None:
                return self.send_json({"error": "Repository not found"}, 404)
            if parts[4:] == ["refs"]:
                tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()]
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1][0]}
                return self.send_json({"branches": [main], "converts": [], "tags": tags})
            oid, files = repo.at(parts[5] if len(parts) > 5 else "main")
            if parts[4:5] == ["tree"]:
                entries = [{"type": "file", "path": n, "size": len(d), "oid": _git_oid(d)} for n, d in files.items()]
                return self.send_json(entries)
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "/".join(parts[2:4]), "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}
            return self.send_json(about)
        if len(parts) > 3 and parts[2] == "resolve":
            oid, files = self.repos["/".join(parts[:2])].at(parts[3])
            name = "/".join(parts[4:])
            if name not in files:
                return self.send_json({"error": "Entry not found"}, 404)
            data = files[name]
            etag = hashlib.sha256(data).hexdigest()
            return self.send_bytes(data, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})
        return self.send_json({"error": f"nothing at {self.path}"}, 404)

    def do_PUT(self) -> None:
        oid, data = self.parts()[-1], self.body()
        self.hold.wait(60)
        if self._told():
            return None
        assert hashlib.sha256(data).hexdigest() == oid
        self.objects[oid] = data
        return self.send_json({})

    def do_DELETE(self) -> None:
        parts = self.parts()
        self.repos["/".join(parts[2:4])].tags.pop(parts[5])
        self.send_json({})

    def do_POST(self) -> None:
        parts, body = self.parts(), self.body()
        self.requests.append("/".join(parts))
        if self.headers.get("Authorization") != "Bearer hf_writes":
            return self.send_json({"error": "Forbidden"}, 403)
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
            url = f"http://{self.headers['Host']}/{repo_id}"
            if repo_id in self.repos:
                return self.send_json({"error": "You already created this model repo", "url": url}, 409)
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.repos[repo_id] = Repo(private)
            return self.send_json({"url": url, "name": repo_id})
        if parts[:2] == ["api", "validate-yaml"]:
            return self.send_json({"errors": [], "warnings": []})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.send_json({"transfer": "basic", "objects": [self._lfs(o) for o in json.loads(body)["objects"]]})
        repo = self.repos["/".join(parts[2:4])]
        if parts[4] == "preupload":
            return self.send_json({"files": [self._preupload(repo, f) for f in json.loads(body)["files"]]})
        if parts[4] == "tag":
            repo.tags[json.loads(body)["tag"]] = parts[5]
            return self.send_json({})
        assert parts[4] == "commit"
        return None if self._told() or self._told(self.commit_statuses) else self._commit(repo, body)

    def _told(self, statuses: list[int] | None = None) -> bool:
        """Answer with the next of `statuses`, if one is left."""
        left = self.statuses if statuses is None else statuses
        if not left:
            return False
        self.send_json({"error": "as the test wants"}, left.pop(0))
        return True

    def _preupload(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        lfs, data = file["path"].endswith(LFS), repo.files.get(file["path"])
        oid = None
        if data is not None:
            oid = hashlib.sha256(data).hexdigest() if lfs else _git_oid(data)
        mode = "lfs" if lfs else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        oid = wanted["oid"]
        actions = {"upload": {"href": f"http://{self.headers['Host']}/lfs/{oid}"}}
        return {"oid": oid, "size": wanted["size"]} | ({} if oid in self.objects else {"actions": actions})

    def _commit(self, repo: Repo, body: bytes) -> None:
        files = dict(repo.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        oid, url = f"{len(repo.commits):040d}", f"http://{self.headers['Host']}/{'/'.join(self.parts()[2:4])}"
        repo.commits.append((oid, files))
        self.send_json({"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})
