"""A chat server on this machine, over real HTTP, that answers as a test tells it to."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(content, *, finish="stop", refusal=None, usage=(7, 3)):
    """The body of an OpenAI-compatible reply."""
    content = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": content, "refusal": refusal}
    tokens = dict(zip(("prompt_tokens", "completion_tokens"), usage))
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {"object": "chat.completion", "choices": [choice], "usage": tokens}


class Chat(ThreadingHTTPServer):
    """Gives `replies` in turn, the last one for ever: a body, or a status, its headers and a body.

    A reply may be a function of the request's JSON; "hang" gives nothing until the end.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.over = list(replies), [], threading.Event()
        self.lock = threading.Lock()

    url = property(lambda self: f"http://127.0.0.1:{self.server_port}/v1")
    bodies = property(lambda self: [body for _, _, body in self.asked])

    def handle_error(self, *_):
        """Nothing: clients that went away are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            n = len(self.server.asked)
            self.server.asked.append((self.path, dict(self.headers), body))
        reply = self.server.replies[min(n, len(self.server.replies) - 1)]
        reply = reply(body) if callable(reply) else reply
        if reply == "hang":
            self.server.over.wait(30)
            return
        status, headers, said = reply if isinstance(reply, tuple) else (200, {}, reply)
        said = (said if isinstance(said, str) else json.dumps(said)).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(said))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        """Nothing, so that tests stay quiet."""


@contextmanager
def serving(*replies):
    """A `Chat` at work."""
    server = Chat(*replies)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
