"""Read the docstring and the default of each field of a dataclass from its source, without importing its module."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class FieldDoc:
    """What the source of a dataclass states of one field. default: None also where it is not a literal."""

    doc: str
    default: Any


@cache
def field_docs(location: str) -> dict[str, FieldDoc]:
    """Return {field: FieldDoc} of a dataclass at "package.module:Class", with the fields that it inherits."""
    module, _, name = location.partition(":")
    spec = find_spec(module)
    source = getattr(spec.loader, "get_source")(module) if spec is not None else ""  # noqa: B009
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    fields: dict[str, FieldDoc] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= field_docs(f"{module}:{base.id}")
        elif isinstance(base, ast.Name) and imported.get(base.id, "").startswith("lcmdistill."):
            fields |= field_docs(imported[base.id])
    body = classes[name].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        field = ast.unparse(node.target)
        has_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        doc = str(following.value.value) if has_doc else fields[field].doc if field in fields else ""  # pyright: ignore
        fields[field] = FieldDoc(" ".join(doc.split()), _literal(node.value))
    return fields


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
