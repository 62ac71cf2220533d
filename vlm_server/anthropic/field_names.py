"""Which of the client's fields became which of a chat's, so that errors and warnings name what the client wrote."""

from vlm_server.errors import ApiError


class FieldNames:
    """A growing table of paths: `messages[1].content[0].image_url` of the chat was the client's `messages[0].content[0].source.url`.

    A path that is not in it has the name of its nearest beginning that is, with the rest behind it; without one it keeps its own.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self._names = dict(names)

    def __setitem__(self, path: str, name: str) -> None:
        self._names[path] = name

    def of(self, path: str) -> str:
        """The client's name of a chat's field."""
        end = len(path)
        while end > 0:
            if path[:end] in self._names:
                return self._names[path[:end]] + path[end:]
            end = max(path.rfind(".", 0, end), path.rfind("[", 0, end))
        return path

    def in_error(self, error: ApiError) -> ApiError:
        """The same error under the client's name."""
        if error.param is None:
            return error
        message = self._renamed(error.message, error.param)
        return ApiError(error.status, error.code, message, param=self.of(error.param), headers=error.headers)

    def in_warning(self, warning: str) -> str:
        """A warning begins with the field that it is about."""
        return self._renamed(warning, warning.partition(": ")[0])

    def _renamed(self, text: str, path: str) -> str:
        return f"{self.of(path)}: {text.removeprefix(f'{path}: ')}" if text.startswith(f"{path}: ") else text
