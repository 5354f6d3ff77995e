"""A program that answers as a server of OpenAI's API does: `double.py serve MODEL --port N`.

Every token is a word; the first takes 20 ms, the others 5 ms.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(200, {"data": [{"id": "double"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["prompt"] == "refuse":
            return self._answer(400, {"error": {"message": "prompt must be nicer"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        count = asked["max_tokens"] - (asked["prompt"] == "short")
        for i in range(count):
            time.sleep(0.005 if i else 0.02)
            self._frame({"choices": [{"text": " word"}]})
        if asked["prompt"] == "break":
            self._frame({"error": {"message": "it broke"}})
        self._frame({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _frame(self, body):
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


if __name__ == "__main__":
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
