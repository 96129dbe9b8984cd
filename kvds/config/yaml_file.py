"""YAML as recipes and plans use it: one mapping, no key twice, numbers as they stand there, nothing constructed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kvds.config.shipped_files import PLANS, RECIPES, shipped_hint
from kvds.errors import InputError, one_line

_ODD_NUMBERS = (
    (r":", "is read in base 60; write it in base 10"),
    (r"^[-+]?0[0-9_]+$", "is read in base 8; write it in base 10"),
    (r"_(?![0-9])|(?<![0-9])_", "has a _ that parts no digits; write it without"),
)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping; raises on duplicate keys."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        """A number as a flag would be read: to YAML 1.1 alone ``010`` is 8, ``1:30`` is 90 and ``1_`` is 1."""
        text = self.construct_scalar(node)
        fault = next((fault for pattern, fault in _ODD_NUMBERS if re.search(pattern, text)), None)
        if fault:
            raise yaml.constructor.ConstructorError(None, None, f"{text!r} {fault}", node.start_mark)
        is_int = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _UniqueKeyLoader.construct_number)


def load_mapping(path: str | Path) -> dict[Any, Any]:
    """A YAML file's mapping, no key given twice.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except OSError as error:
        raise InputError(
            f"--config {path}: {error.strerror}; expected a recipe file{shipped_hint(path, RECIPES, PLANS)}"
        ) from error
    except Exception as error:  # YAML's own, and whatever Python raises where a tag and its value do not go together
        raise InputError(f"--config {path}: not YAML ({one_line(error)}); expected lines of `key: value`") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path}: holds a {type(content).__name__}; expected a mapping, lines of `key: value`"
        )
    return content
