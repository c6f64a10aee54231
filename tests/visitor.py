"""A visitor of the demo page without a browser: the requests that the page's scripts make."""

import contextlib
import json
import secrets
from collections.abc import Iterator

import httpx


class Visitor:
    """Has a session of its own."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=f"{address}gradio_api/", timeout=60)
        self.session = secrets.token_hex(8)
        config = httpx.get(f"{address}config").json()
        states = {c["id"] for c in config["components"] if c["type"] == "state"}
        self.events = {
            event["api_name"]: (event["id"], [i in states for i in event["inputs"]])
            for event in config["dependencies"]
        }

    def join(self, name: str, *values, **data) -> None:
        """Sends an event: what is in its inputs, states apart, and what it tells."""
        index, states = self.events[name]
        values = iter(values)
        body = {
            "fn_index": index,
            "session_hash": self.session,
            "data": [None if is_state else next(values) for is_state in states],
            "event_data": data or None,
        }
        assert not list(values)
        # By hand: NaN is no JSON, but is taken.
        answer = self.http.post(
            "queue/join", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        answer.raise_for_status()

    @contextlib.contextmanager
    def messages(self) -> Iterator[Iterator[dict]]:
        """What the page tells, until the last event is done; who leaves the context is gone."""
        parameters = {"session_hash": self.session}
        with self.http.stream("GET", "queue/data", params=parameters) as lines:
            yield (
                json.loads(line.removeprefix("data: "))
                for line in lines.iter_lines()
                if line.startswith("data: ")
            )

    def send(self, name: str, *values, **data) -> dict:
        """Sends an event. Its outputs as `data`, or an `error`; what was told as `log`."""
        self.join(name, *values, **data)
        log = None
        with self.messages() as messages:
            for message in messages:
                log = message["log"] if message["msg"] == "log" else log
                if message["msg"] == "process_completed":
                    return {**message["output"], "log": log}
        raise AssertionError("the event has no end")

    def open(self, file: dict | None) -> dict:
        """Opens an uploaded file, as the page does by two events."""
        answer = self.send("open_", file)
        return answer if "error" in answer else self.send("show_opened")

    def upload(self, content: bytes) -> dict:
        """The file as an event's value."""
        answer = self.http.post("upload", files={"files": ("photo.png", content)})
        answer.raise_for_status()
        return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
