"""A small server that speaks the Hub's upload and download routes on loopback: repositories, LFS, commits, faults."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubServer(ThreadingHTTPServer):
    """`faults` is a list of (part of the path, status, headers): each is answered once, in order, then forgotten."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.blobs, self.commits, self.faults, self.seen = {}, {}, [], [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args):
        pass

    def _answer(self, body=None, status=200, headers=None):
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.seen.append((self.command, path))
        for fault in list(hub.faults):
            if fault[0] in path:
                hub.faults.remove(fault)
                return self._answer({"error": "a fault on purpose"}, fault[1], fault[2])
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            hub.repositories.setdefault(name, {})
            return self._answer({"url": f"{hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            return self._answer(
                {
                    "files": [
                        {
                            "path": f["path"],
                            "uploadMode": mode[f["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for f in files
                    ]
                }
            )
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [o | {"actions": {"upload": {"href": f"{hub.url}/blob/{o['oid']}"}}} for o in objects]
            return self._answer({"transfer": "basic", "objects": upload})
        if path.startswith("/blob/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/blob/"):
                return self._answer({"error": "hash"}, 400)
            hub.blobs[path.removeprefix("/blob/")] = body
            return self._answer()
        if "/commit/main" in path:
            return self._commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        return self._answer({"error": f"no route {self.command} {path}"}, 404)

    def _commit(self, name, body):
        hub = self.server
        files = {}
        for line in filter(None, body.decode().splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = hub.blobs[entry["value"]["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        hub.commits.append((name, oid, files))
        hub.repositories[name].update(files)
        return self._answer(
            {"commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "success": True, "hookOutput": ""}
        )

    do_GET = do_POST = do_PUT = do_HEAD = _handle
