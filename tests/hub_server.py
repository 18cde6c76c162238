"""A Hugging Face Hub on the loopback interface: the part of its HTTP interface that loading and publishing use."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

LFS_SUFFIXES = (".safetensors", ".bin")


class LoopbackHub:
    """Repositories in memory behind a real HTTP server.

    Attributes:
        address: for HF_ENDPOINT.
        repositories: {id: {revision: {path: bytes}}}.
        served: paths of files whose bytes were sent.
        requests: all requests, as "METHOD path".
        token: if set, what requests must carry.
        gated: answer every request for a file with the error of a repository whose terms nobody has accepted.
        break_off: {path: bytes}: the connection is closed after so many of them.
        damage: paths that are sent with a flipped byte.
        refuse_commits: answer commits with an error.
    """

    def __init__(self):
        self.repositories, self.uploads = {}, {}
        self.reset()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def reset(self):
        self.repositories.clear()
        self.served, self.requests = [], []
        self.gated = False
        self.token, self.break_off, self.damage, self.refuse_commits = None, {}, set(), False

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def publish(self, folder, repo_id, revision="main", prefix=""):
        files = {
            prefix + path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repositories.setdefault(repo_id, {}).setdefault(revision, {}).update(files)

    def find(self, repo_id, revision):
        """(commit, files) of a branch or commit."""
        for name, files in self.repositories.get(repo_id, {}).items():
            digest = hashlib.sha1(name.encode())
            for path in sorted(files):
                digest.update(path.encode() + files[path])
            if revision in (name, digest.hexdigest()):
                return digest.hexdigest(), files
        return None, None

    def answer(self, request):
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.requests.append(f"{request.command} {path}")
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            # The Hub does not tell strangers which repositories exist.
            return self.error(request, 401, "RepoNotFound", "Repository Not Found")
        if request.command == "PUT":
            self.uploads[path.rpartition("/")[2]] = body
            return self.reply(request, b"")
        if request.command == "POST":
            return self.post(request, path, body)
        if path.startswith("/api/models/"):
            return self.information(request, path.removeprefix("/api/models/"))
        if self.gated:
            return self.error(request, 403, "GatedRepo", "Access to this repository is restricted")
        repo_id, _, rest = path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit, files = self.find(repo_id, revision)
        if files is None:
            code = "RevisionNotFound" if repo_id in self.repositories else "RepoNotFound"
            return self.error(request, 404, code, code)
        if name not in files:
            return self.error(request, 404, "EntryNotFound", f"{name} is not there")
        self.file(request, name, commit, files[name])

    def file(self, request, name, commit, data):
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        else:
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        headers["ETag"] = f'"{digest}"'
        if name in self.damage:
            data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        start, status = 0, 200
        if request.headers.get("Range"):
            start = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"], status = f"bytes {start}-{len(data) - 1}/{len(data)}", 206
        if request.command == "GET":
            self.served.append(name)
        self.reply(request, data[start:], headers, status, self.break_off.get(name))

    def information(self, request, path):
        repo_id, _, rest = path.partition("/revision/")
        if "/tree/" in path:
            repo_id, _, rest = path.partition("/tree/")
        revision = rest.partition("/")[0] or "main"
        commit, files = self.find(repo_id, revision)
        if files is None:
            code = "RevisionNotFound" if repo_id in self.repositories else "RepoNotFound"
            return self.error(request, 404, code, code)
        if "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
            return self.json(request, entries)
        self.json(request, {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]})

    def post(self, request, path, body):
        if path == "/api/validate-yaml":
            return self.json(request, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or 'someone'}/{wanted['name'].rpartition('/')[2]}"
            if repo_id in self.repositories:
                return self.json(request, {"error": "exists", "url": f"{self.address}/{repo_id}"}, 409)
            self.repositories[repo_id] = {"main": {}}
            return self.json(request, {"url": f"{self.address}/{repo_id}", "name": repo_id})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{self.address}/upload/{o['oid']}", "header": {}}}}
                for o in json.loads(body)["objects"]
            ]
            return self.json(request, {"transfer": "basic", "objects": objects})
        repo_id, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self.json(request, {"files": modes})
        repo_id, _, rest = path.removeprefix("/api/models/").partition("/branch/")
        if rest:
            self.repositories[repo_id].setdefault(rest, dict(self.repositories[repo_id]["main"]))
            return self.json(request, {})
        repo_id, _, revision = path.removeprefix("/api/models/").partition("/commit/")
        if not revision:
            return self.error(request, 404, "EntryNotFound", path)
        if self.refuse_commits:
            return self.error(request, 403, "Forbidden", "you may not write here")
        files = dict(self.repositories[repo_id][revision])
        for line in filter(None, body.split(b"\n")):
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                data = self.uploads.pop(value["oid"])
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
        self.repositories[repo_id][revision] = files
        commit = self.find(repo_id, revision)[0]
        self.json(
            request,
            {"success": True, "commitOid": commit, "commitUrl": f"{self.address}/{repo_id}/commit/{commit}"},
        )

    def json(self, request, value, status=200):
        self.reply(request, json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def error(self, request, status, code, message):
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
        self.reply(request, json.dumps({"error": message}).encode(), headers, status)

    def reply(self, request, body, headers=None, status=200, limit=None):
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body if limit is None else body[:limit])
            if limit is not None:
                request.wfile.flush()
                request.close_connection = True
                request.connection.shutdown(2)


def use_hub(monkeypatch, hub, home):
    """Makes a loopback Hub this process's own, with its cache in the folder `home`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template[template.index("/{repo_id}") :]
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "t")


WORKER = """
import json, sys, traceback
out, sys.stdout = sys.stdout, sys.stderr
import torch
torch.set_num_threads(1)
from metaaux import MetaAuxInverter
import huggingface_hub
from pathlib import Path
huggingface_hub.utils.disable_progress_bars()
for line in sys.stdin:
    scope = dict(globals())
    try:
        exec(json.loads(line), scope)
        reply = {"result": scope.get("result")}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        reply = {"kinds": kinds, "message": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(reply), file=out, flush=True)
"""
