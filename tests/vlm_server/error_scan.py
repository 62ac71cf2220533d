"""Finds in our source which codes an error of the API can have, and with which statuses.

Reads syntax alone. Where a code is not written out, its values are looked up where they come from: a name's assignments, a function's
returns, a table's values. What it cannot follow is an error of the test, so that no code goes unseen.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "vision", "vlm_server")
PREFIX = "api:"  # of the codes in our own pydantic errors


@dataclass(frozen=True, slots=True)
class Raised:
    """status: None where it is that of an error which was made elsewhere, or of a table."""

    code: str
    status: int | None
    place: str


def raised_codes() -> list[Raised]:
    """All of them, in all of our packages."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [found for path in files for found in Module(path).raised()]


class Module:
    def __init__(self, path: Path) -> None:
        self._name = str(path.relative_to(ROOT))
        self._tree = ast.parse(path.read_text())
        self._functions = {node.name: node for node in ast.walk(self._tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}

    def raised(self) -> Iterator[Raised]:
        seen: set[ast.AST] = set()
        for scope in [*self._functions.values(), self._tree]:  # inner functions are seen with their outer ones, and once
            for node in ast.walk(scope):
                if isinstance(node, ast.Call) and node not in seen:
                    seen.add(node)
                    yield from self._of_call(node, scope)

    def _of_call(self, call: ast.Call, scope: ast.AST) -> Iterator[Raised]:
        place = f"{self._name}:{call.lineno}"
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        given = dict(enumerate(call.args))
        match getattr(call.func, "id", getattr(call.func, "attr", "")):
            case "ApiError":
                pairs = [(given[1], given[0])]
            case "bad_request":
                pairs = [(given[0], ast.Constant(400))]
            case "MediaError":
                pairs = [(given[0], keywords.get("status", ast.Constant(400)))]
            case "Failure":
                pairs = [(given[0], given.get(2, ast.Constant(400)))]
            case "PydanticCustomError":
                pairs = [(given[0], ast.Constant(400))]
            case _:
                pairs = [(keywords["custom_error_type"], ast.Constant(400))] if "custom_error_type" in keywords else []
        for code, status in pairs:
            for text in self._texts(code, scope, place):
                yield Raised(text.removeprefix(PREFIX), _number(status), place)

    def _texts(self, node: ast.expr, scope: ast.AST, place: str) -> set[str]:
        """What a code may be; nothing where it is that of an error made elsewhere."""
        match node:
            case ast.Constant(value=str(text)):
                return {"missing_required_parameter"} if text == "missing" else {text}
            case ast.IfExp(body=body, orelse=other):
                return self._texts(body, scope, place) | self._texts(other, scope, place)
            case ast.Attribute(attr="code"):
                return set()
            case ast.Name(id=name):
                values = [found.value for found in ast.walk(scope) if isinstance(found, ast.Assign) and _targets(found) == [name]]
                is_given = isinstance(scope, ast.FunctionDef) and name in [argument.arg for argument in scope.args.args]
                assert values or is_given, f"{place}: where does {name} come from?"
                return {text for value in values for text in self._texts(value, scope, place)}
            case ast.Call(func=ast.Attribute(attr="removeprefix")):
                return set()  # of a pydantic error, which is made elsewhere
            case ast.Call(func=ast.Attribute(attr="get", value=ast.Name(id=table)), args=[_, default]):
                return self._values(table) | self._texts(default, scope, place)
            case ast.Call(func=ast.Name(id=name)) if name in self._functions:
                returns = [found.value for found in ast.walk(self._functions[name]) if isinstance(found, ast.Return) and found.value]
                return {text for value in returns for text in self._texts(value, self._functions[name], place)}
        raise AssertionError(f"{place}: write the code as a text: {ast.unparse(node)}")

    def _values(self, table: str) -> set[str]:
        """Of a dict of the module."""
        tables = [node.value for node in self._tree.body if isinstance(node, ast.Assign) and _targets(node) == [table]]
        return {value.value for found in tables if isinstance(found, ast.Dict) for value in found.values if isinstance(value, ast.Constant)}


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _number(node: ast.expr) -> int | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, int) else None
