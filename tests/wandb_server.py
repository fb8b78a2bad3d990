"""As much of W&B's server as its client needs; a streamed line replaces one at its offset."""

import gzip
import json
import re
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ME = {"id": "u", "name": "me", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        if self.path == "/graphql":
            query = json.loads(body)
            name = re.findall(r"(?:query|mutation)\s+(\w+)", query["query"])[0]
            answer = getattr(self.server, name, None)
            self.reply({"data": answer(**(query.get("variables") or {})) if answer else {}})
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
            self.reply({"exitcode": None, "limits": {}})
        else:
            self.reply({})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.uploads[self.path.removeprefix("/upload/")] = body
        self.reply({})

    def reply(self, data):
        body = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self):
        with suppress(ConnectionError):  # the client's process may be killed
            super().handle()

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """The methods with capital letters are the queries of W&B's GraphQL."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.projects = {"capo_exp"}
        self.uploads: dict[str, bytes] = {}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, run):
        """What was logged, without W&B's own keys."""
        rows = map(json.loads, self.runs[run]["files"].get(HISTORY, []))
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def stream(self, run, body):
        for name, part in (body.get("files") or {}).items():
            lines = self.runs[run]["files"].setdefault(name, [])
            lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
        if body.get("complete"):
            self.runs[run]["state"] = "failed" if body.get("exitcode") else "finished"

    def Viewer(self):
        return {"viewer": ME}

    def GetDefaultEntity(self):
        return {"viewer": ME}

    def UpsertBucket(self, *, name, **given):
        new = name not in self.runs
        run = self.runs.setdefault(name, {"files": {}, "state": "running"})
        run |= {key: value for key, value in given.items() if value is not None or key not in run}
        return {"upsertBucket": {"inserted": new, "bucket": self._bucket(name)}}

    def RunResumeStatus(self, *, project, name, **_):
        bucket = self._bucket(name) if name in self.runs else None
        entity = {"id": "e", "name": "me"}
        return {"model": {"id": "p", "name": project, "entity": entity, "bucket": bucket}}

    def CreateRunFiles(self, *, files, **_):
        places = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in files]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": places}}

    def Runs(self, *, project, filters, **_):
        if project not in self.projects:
            return {"project": None}
        wanted = json.loads(filters)
        found = [name for name, run in self.runs.items() if _matches(name, run, wanted)]
        edges = [{"node": self._bucket(name), "cursor": name} for name in found]
        pages = {"edges": edges, "pageInfo": {"endCursor": "", "hasNextPage": False}}
        return {"project": {"internalId": "1", "runCount": len(found), "readOnly": False, "runs": pages}}

    def Run(self, *, name, **_):
        return {"project": {"run": self._bucket(name)}}

    def RunHistoryKeys(self, *, name, **_):
        steps = [json.loads(line)["_step"] for line in self.runs[name]["files"].get(HISTORY, [])]
        return {"project": {"run": {"historyKeys": {"lastStep": max(steps, default=-1)}}}}

    def RunParquetHistory(self, *, runName, **_):
        steps = [{"_step": json.loads(line)["_step"]} for line in self.runs[runName]["files"][HISTORY]]
        return {"project": {"run": {"parquetHistory": {"parquetUrls": [], "liveData": steps}}}}

    def HistoryPage(self, *, run, minStep, maxStep, **_):
        lines = self.runs[run]["files"][HISTORY]
        page = [line for line in lines if minStep <= json.loads(line)["_step"] < maxStep]
        return {"project": {"run": {"history": page}}}

    def _bucket(self, name):
        run = self.runs[name]
        history, summary = run["files"].get(HISTORY, []), run["files"].get(SUMMARY, ["{}"])[-1]
        return {
            "id": f"bucket-{name}", "name": name, "displayName": run["displayName"], "state": run["state"],
            "group": run["groupName"], "jobType": run["jobType"], "tags": run["tags"] or [],
            "config": run["config"], "summaryMetrics": summary, "systemMetrics": "{}", "projectId": "1",
            "project": {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "me"}},
            "historyLineCount": len(history), "historyTail": json.dumps(history[-1:]), "user": ME,
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0, "description": None, "notes": None,
            "sweepName": None, "commit": None, "readOnly": False, "wandbConfig": '{"t": {"1": [1]}}',
            "createdAt": "2026-11-21T00:00:00", "heartbeatAt": "2026-11-21T00:00:00",
        }  # fmt: skip


def _matches(name, run, wanted):
    """The filters that the exporter uses, of MongoDB's many."""
    has = {"group": run["groupName"], "name": name, "tags": run["tags"] or []}
    return all(
        any(value in has[key] if isinstance(has[key], list) else value == has[key] for value in choice["$in"])
        for key, choice in wanted.items()
    )


@contextmanager
def serve():
    """A server of its own thread, on a free port of this machine."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
