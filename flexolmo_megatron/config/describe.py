"""The options of a configuration as help text: name, type, default and the docstring below each field."""

import ast
import inspect
import textwrap
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass


def _docstrings(schema: type) -> dict[str, str]:
    """Docstring below each field, read from the class's source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0].body
    texts = {}
    for statement, following in zip(body, body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(following.value.value.split())
    return texts


def describe(schema: type, prefix: str = "") -> str:
    """Return one paragraph per option of ``schema``, nested ones with dotted names."""
    texts = _docstrings(schema)
    blocks = []
    for field in fields(schema):
        name = f"{prefix}{field.name}"
        if is_dataclass(field.type):
            blocks.append(describe(field.type, f"{name}."))
            continue
        default = field.default if field.default is not NO_DEFAULT else field.default_factory()
        shown = "required" if default == "???" else f"default {default}"
        blocks.append(
            f"  {name} ({shown})\n"
            + textwrap.fill(texts.get(field.name, ""), 110, initial_indent="      ", subsequent_indent="      ")
        )
    return "\n".join(blocks)
