"""A small Hub on loopback: repositories with commits, revisions and pull requests, blobs by their hash, LFS, and faults.

It answers what huggingface_hub's own client asks; nothing of the client is replaced. Refused like the true one: a commit on a
parent that is no longer the head (412), a blob whose hash is not its name, a private repository without a token.
"""

import base64
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

CUT = "cut"


class Repository:
    """Commits (parent, files as path -> blob's sha256) by their ids, and where each branch is."""

    def __init__(self, private):
        self.private, self.commits, self.refs = private, {}, {}
        self.commit("main", {}, [], b"first", None)

    def commit(self, ref, add, delete, seed, message):
        parent = self.refs.get(ref)
        files = dict(self.commits[parent]["files"]) if parent else {}
        files = {path: blob for path, blob in files.items() if path not in delete} | add
        oid = hashlib.sha1(seed + str(parent).encode() + json.dumps(files).encode()).hexdigest()
        self.commits[oid] = {"parent": parent, "files": files, "message": message, "added": sorted(add)}
        self.refs[ref] = oid
        return oid

    def resolve(self, revision):
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


class HubServer(ThreadingHTTPServer):
    """`faults` is a list of (method, part of the path, status or CUT, headers): each once, in order, then forgotten.

    CUT reads half of what is sent, and closes the connection. `token`: what uploads need, if any.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.blobs, self.faults, self.seen, self.token = {}, {}, [], [], None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()  # it then stops at once

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def clear(self):
        for kept in (self.repositories, self.blobs, self.faults, self.seen):
            kept.clear()
        self.token = None

    def history(self, name, ref="main"):
        """The commits of a branch, oldest first, without the empty one that began it."""
        repository, found = self.repositories[name], []
        at = repository.refs[ref]
        while repository.commits[at]["parent"]:
            found.insert(0, repository.commits[at] | {"oid": at})
            at = repository.commits[at]["parent"]
        return found

    def files(self, name, ref="main"):
        """Path -> bytes, at a revision."""
        repository = self.repositories[name]
        tree = repository.commits[repository.resolve(ref)]["files"]
        return {path: self.blobs[blob] for path, blob in tree.items()}

    def publish(self, name, folder, ref="main"):
        """Commit a folder's files as they are; a dataset's name begins with datasets/. Another ref starts from main."""
        repository = self.repositories.setdefault(name, Repository(False))
        repository.refs.setdefault(ref, repository.refs["main"])
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            files[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
            self.blobs[hashlib.sha256(data).hexdigest()] = data
        return repository.commit(ref, files, [], name.encode(), "as the Hub has it")

    def puts(self):
        return [path for method, path in self.seen if method == "PUT"]


WORKER = """
import contextlib, io, json, os, sys, time, traceback
import rsoups.cli.main, rsoups.soups.share
sleep = time.sleep
for line in sys.stdin:
    asked = json.loads(line)
    os.chdir(asked["cwd"])
    sys.argv, status, out, err, time.sleep = ["test.py", *asked["arguments"]], 0, io.StringIO(), io.StringIO(), sleep
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(asked["code"], {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Client:
    """A Python whose huggingface_hub talks to the server: it reads its endpoint when it is imported. One for many calls."""

    def __init__(self, server, home, token):
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
        }
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "HF_HOME": str(home), "PYTHONWARNINGS": "ignore"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], env=env, text=True, **pipes)

    def __call__(self, folder, code, *arguments):
        """Exit status, stdout and stderr of a script that is run in a folder."""
        asked = {"cwd": str(folder), "code": code, "arguments": [str(a) for a in arguments]}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, body=None, status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        named = {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        for name, value in named.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status, message, headers=None):
        self._answer({"error": message}, status, {"X-Error-Message": message} | (headers or {}))

    def _handle(self):
        hub, url = self.server, urlsplit(self.path)
        path, length = unquote(url.path), int(self.headers.get("Content-Length") or 0)
        with hub.lock:
            hub.seen.append((self.command, path))
            fault = next((f for f in hub.faults if f[0] == self.command and f[1] in path), None)
            if fault:
                hub.faults.remove(fault)
        if fault and fault[2] == CUT:
            self.rfile.read(length // 2)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.rfile.read(length)
        if fault:
            return self._error(fault[2], "a fault on purpose", fault[3])
        with hub.lock:
            return self._route(path, parse_qs(url.query), body)

    def _route(self, path, query, body):
        hub = self.server
        is_write = self.command in ("POST", "PUT") and not path.startswith("/blob/")
        if hub.token and is_write and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "Invalid username or password.")
        if path == "/api/whoami-v2":
            return self._answer({"name": "someone", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if name in hub.repositories:
                return self._answer({"error": "You already created it", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = Repository(wanted.get("visibility") == "private")
            return self._answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if path.startswith("/blob/"):
            return self._blob(path.removeprefix("/blob/"), body)
        return self._repository(path, query, body)

    def _blob(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "the blob's hash is another one")
        self.server.blobs[oid] = body
        return self._answer()

    def _repository(self, path, query, body):
        words = path.strip("/").split("/")
        api, words = words[0] == "api", words[words[0] == "api" :]
        kind, words = ("datasets/", words[1:]) if words[0] == "datasets" else ("", words[words[0] == "models" :])
        name = kind + "/".join(words[:2]).removesuffix(".git")
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and "Authorization" not in self.headers):
            return self._error(401, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        action, rest = (words[2], words[3:]) if len(words) > 2 else ("revision", ["main"])
        if action == "info":
            return self._lfs(json.loads(body)["objects"])
        if action == "preupload":
            return self._preupload(json.loads(body)["files"])
        if action == "commit":
            return self._commit(name, repository, rest[0], body, "create_pr" in query)
        parts = 3 if rest[0] == "refs" else 1
        revision, inside = "/".join(rest[:parts]), "/".join(rest[parts:])
        oid = repository.resolve(revision)
        if oid is None:
            return self._error(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[oid]["files"]
        if action == "resolve":
            return self._file(files, oid, inside)
        if api and action == "tree":
            return self._tree(files, inside, query.get("recursive") in (["True"], ["true"], ["1"]))
        if api and action == "paths-info":
            wanted = (parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body))["paths"]
            found = [self._entry(path, files[path]) for path in wanted if path in files]
            folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in files)]
            return self._answer(found + [self._folder(path) for path in folders])
        about = {"id": name.removeprefix(kind), "modelId": name, "sha": oid, "private": repository.private, "tags": []}
        about |= {"downloads": 0, "siblings": [{"rfilename": path} for path in files]}
        return self._answer(about | ({} if kind else {"cardData": self._card(files)}))

    def _tree(self, files, folder, recursive):
        start = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(start)}
        here = [path for path in inside if recursive or "/" not in path.removeprefix(start)]
        parents = {path.rsplit("/", 1)[0] for path in inside if "/" in path.removeprefix(start)}
        if not inside:
            return self._error(404, f"{folder} does not exist", {"X-Error-Code": "EntryNotFound"})
        folders = parents if recursive else {start + path.removeprefix(start).split("/")[0] for path in parents}
        return self._answer([self._folder(path) for path in sorted(folders)] + [self._entry(p, files[p]) for p in here])

    def _folder(self, path):
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}

    def _card(self, files):

        text = self.server.blobs.get(files.get("README.md", ""), b"").decode()
        return yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}

    def _entry(self, path, blob):
        data = self.server.blobs[blob]
        found = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
        if path.endswith(".safetensors"):
            found["lfs"] = {"oid": blob, "size": len(data), "pointerSize": 134}
        return found

    def _lfs(self, objects):
        missing = [o for o in objects if o["oid"] not in self.server.blobs]
        found = [o for o in objects if o["oid"] in self.server.blobs]
        upload = [o | {"actions": {"upload": {"href": f"{self.server.url}/blob/{o['oid']}"}}} for o in missing]
        return self._answer({"transfer": "basic", "objects": upload + found})

    def _preupload(self, files):
        mode = {True: "lfs", False: "regular"}
        told = [(f["path"], mode[f["path"].endswith(".safetensors")]) for f in files]
        return self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in told]})

    def _commit(self, name, repository, ref, body, create_pr):
        hub, add, delete, head = self.server, {}, set(), {}
        for entry in map(json.loads, filter(None, body.decode().splitlines())):
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                head = value
            elif kind == "deletedFile":
                delete.add(value["path"])
            elif kind == "lfsFile":
                add[value["path"]] = value["oid"]
            else:
                data = base64.b64decode(value["content"])
                add[value["path"]] = hashlib.sha256(data).hexdigest()
                hub.blobs[add[value["path"]]] = data
        if head.get("parentCommit") not in (None, repository.refs[ref]):
            return self._error(412, "A commit has happened since. Please refresh and try again.")
        if lost := [path for path, blob in add.items() if blob not in hub.blobs]:
            return self._error(400, f"no blob for {lost}")
        more = {}
        if create_pr:
            number = sum(key.startswith("refs/pr/") for key in repository.refs) + 1
            repository.refs[f"refs/pr/{number}"], ref = repository.refs[ref], f"refs/pr/{number}"
            more = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"}
        oid = repository.commit(ref, add, delete, body, head.get("summary"))
        url = f"{hub.url}/{name}/commit/{oid}"
        return self._answer({"commitOid": oid, "commitUrl": url, "success": True, "hookOutput": ""} | more)

    def _file(self, files, oid, path):
        if path not in files:
            return self._error(404, "Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        data, blob = self.server.blobs[files[path]], files[path]
        headers = {"ETag": f'"{blob}"', "X-Repo-Commit": oid, "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        headers |= {"X-Linked-Etag": f'"{blob}"', "Content-Type": "application/octet-stream"}
        return self._answer(data, 200, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle


TOKEN = "hf_neverToBePrintedAnywhere"


def files_with_the_token(folder):
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
