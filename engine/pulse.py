"""Tells a process that is stopped, or waits for what never comes, from one that computes: by the processor time that it uses.

Linux's /proc is read; where there is none, every process counts as busy. Knows nothing of what the process does.
"""

from pathlib import Path

_STATE, _USER_TICKS, _SYSTEM_TICKS = 0, 11, 12  # fields of /proc/*/stat behind the name
_WAITS_FOR_A_DISK = "D"


class Pulse:
    """Of one process and its children, from look to look."""

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self._ticks = self._look()

    def is_still(self) -> bool:
        """Whether none of them computed, or waited for a disk, since the last look."""
        before, self._ticks = self._ticks, self._look()
        return self._ticks is not None and self._ticks == before

    def _look(self) -> dict[int, int] | None:
        """Each process's ticks of the clock (usually 10 ms); None where that cannot be told."""
        try:
            children = Path(f"/proc/{self._process_id}/task/{self._process_id}/children").read_text().split()
            fields = {process_id: _fields(process_id) for process_id in (self._process_id, *map(int, children))}
        except (OSError, ValueError):
            return None
        if any(values[_STATE] == _WAITS_FOR_A_DISK for values in fields.values()):
            return None
        return {process_id: int(values[_USER_TICKS]) + int(values[_SYSTEM_TICKS]) for process_id, values in fields.items()}


def _fields(process_id: int) -> list[str]:
    """Behind the process's name, which may hold blanks and brackets."""
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
