"""What lines of the log look like: text for people, or a JSON object each for machines. The engine process and the server write alike.

A record that has `fields` (given as `extra={"fields": …}`) is written as these in JSON; its text is for the other format alone.
"""

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

TEXT, JSON = LOG_FORMATS = ("text", "json")


class JsonLines(logging.Formatter):
    """`{"time": …, "level": …, "logger": …, "message": …}`, or a record's own fields in the message's place."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] | None = getattr(record, "fields", None)
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(level: str | int, log_format: str) -> None:
    """Of this process, unless it has logging already: everything from `level` on to stderr, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == JSON else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
