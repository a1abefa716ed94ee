"""A file of lines that somebody adds to, read while it grows."""

from pathlib import Path

from raytune.storage import read_from


class Tail:
    """Each look reads what was added since the one before, however long the file is.

    Half a line, which is still being written or which a crash left, waits for a later look. A file that is no longer the one that
    was read, because it is shorter or its last known line has changed, is read again from its beginning.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self.begin()

    def begin(self) -> None:
        """Forget what was read."""
        self._offset, self._last_line = 0, b""
        self.is_new = True
        """Whether the last look began at the beginning of the file: what was known of another one does not count any more."""

    @property
    def num_bytes(self) -> int:
        """How much of the file was read, in whole lines."""
        return self._offset

    def look(self) -> list[bytes]:
        """Lines that are new, without their ends; none of a file that is not there.

        Raises:
            ClusterError: if the storage does not answer.
        """
        self.is_new = not self._offset
        data = self._added()
        lines = data[: data.rfind(b"\n") + 1]
        if lines:
            self._offset += len(lines)
            self._last_line = lines[lines.rfind(b"\n", 0, -1) + 1 :]
        return lines.split(b"\n")[:-1]

    def _added(self) -> bytes:
        """What the file holds behind what was read."""
        try:
            data = read_from(self._path, self._offset - len(self._last_line))
            if data.startswith(self._last_line):
                return data[len(self._last_line) :]
            self.begin()
            return read_from(self._path, 0)
        except FileNotFoundError:
            self.begin()
            return b""
