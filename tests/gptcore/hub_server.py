"""The part of the Hub's protocol by which its real client lists and reads a dataset's files.

python -m tests.gptcore.hub_server FOLDER    prints its address, serves FOLDER/{owner}/{name}/…
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """What a request is, and how it is answered."""

    def parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def body(self) -> bytes:
        """Of a stated length, or in chunks."""
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def send_json(self, value: object, status: int = 200) -> None:
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def send_bytes(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


class Hub(Handler):
    folder: Path

    def newest(self) -> str:
        """The newest commit: what a file `commit` in the folder says, if it is there."""
        file = self.folder / "commit"
        return file.read_text() if file.exists() else COMMIT

    def do_GET(self) -> None:
        parts = self.parts()
        if parts[:2] == ["api", "datasets"] and len(parts) > 4 and parts[4] == "tree":
            self._tree("/".join(parts[2:4]), "/".join(parts[6:]))
        elif parts[:2] == ["api", "datasets"]:
            revision = parts[5] if parts[4:5] == ["revision"] else self.newest()
            self.send_json({"id": "/".join(parts[2:4]), "sha": revision, "private": False, "siblings": [], "tags": []})
        elif parts[0] == "datasets" and parts[3] == "resolve":
            self._file(self.folder / parts[1] / parts[2] / "/".join(parts[5:]))
        else:
            self.send_json({"error": "not here"}, 404)

    def do_POST(self) -> None:
        parts, body = self.parts(), self.body().decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        root = self.folder / "/".join(parts[2:4])
        self.send_json([self._entry(root, root / path) for path in wanted if (root / path).exists()])

    def _entry(self, root: Path, path: Path) -> dict[str, object]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "oid": COMMIT, "size": size, "path": str(path.relative_to(root))}

    def _tree(self, repo: str, inside: str) -> None:
        root = self.folder / repo
        if not (root / inside).is_dir():
            return self.send_json({"error": "no such folder"}, 404)
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        found = (root / inside).rglob("*") if recursive else (root / inside).iterdir()
        return self.send_json([self._entry(root, p) for p in sorted(found)])

    def _file(self, path: Path) -> None:
        data, status, extra = path.read_bytes(), 200, {}
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            total, data = len(data), data[int(first) : int(last or len(data)) + 1]
            status, extra = 206, {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{total}"}
        self.send_bytes(
            data, status, {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"} | extra
        )


if __name__ == "__main__":
    Hub.folder = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
