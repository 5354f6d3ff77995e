"""What a server's process says of its life: plain lines, or JSON objects."""

import json
import sys
from datetime import UTC, datetime
from typing import Any

from ..inference.server.config import LogFormat


class Narrator:
    """What a server's process says of its life on stdout, and at last on stderr."""

    def __init__(self, form: LogFormat) -> None:
        self._json = form == "json"

    def tell(self, event: str, text: str, **fields: Any) -> None:
        """Something has happened."""
        print(self._line("info", event, text, fields), flush=True)

    def fail(self, text: str) -> None:
        """The root cause, which is the last line."""
        sys.stdout.flush()
        print(self._line("error", "failed", f"turnout: {text}", {}), file=sys.stderr, flush=True)

    def _line(self, level: str, event: str, text: str, fields: dict[str, Any]) -> str:
        if not self._json:
            return text
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": moment, "level": level, "event": event, "message": text} | fields, default=str)
