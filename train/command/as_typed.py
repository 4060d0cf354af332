"""The config as it may be recorded: values from the environment stay as they were typed.

The run itself uses the resolved value of `data.path=${oc.env:HOME}/text`. But run directories, TensorBoard and trackers
are shown to other people, and environment variables may be private, so the resolved value is not recorded. Other
interpolations, such as `${train.seq_len}`, are resolved.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.resolvers import oc

DIGEST = re.compile(r"sha256:[0-9a-f]{12}")


@dataclass(frozen=True)
class Typed:
    """A value that comes from the environment. `path`: its keys and indices, for example ("data", "path")."""

    path: tuple[Any, ...]
    text: str  # as it was typed
    value: Any

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))

    @property
    def digest(self) -> str:
        """A hash that replaces the value when two runs are compared; it matches DIGEST."""
        return f"sha256:{hashlib.sha256(repr(self.value).encode()).hexdigest()[:12]}"


def yaml(tree: DictConfig) -> str:
    """The tree as YAML, with values from the environment as they were typed."""
    container = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    for typed in from_environment(tree):
        put(container, typed.path, typed.text)
    return OmegaConf.to_yaml(OmegaConf.create(container), resolve=False)


def put(container: Any, path: tuple[Any, ...], value: Any) -> None:
    """Replace the value at `path`, if the container has one there."""
    *parents, last = path
    for key in parents:
        if container is None:
            return
        container = container.get(key) if isinstance(container, dict) else container[key]
    if container is not None and (isinstance(container, list) or last in container):
        container[last] = value


def from_environment(tree: DictConfig) -> list[Typed]:
    """Every value of the tree that comes from the environment, in the tree's order."""
    return list(_typed((), tree))


def _typed(path: tuple[Any, ...], node: DictConfig | ListConfig) -> Iterator[Typed]:
    if node._is_none() or node._is_missing():
        return
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child = node._get_node(key)
        if OmegaConf.is_interpolation(node, key):
            with _asked() as asked:
                value = node[key]
                if isinstance(value, Container):
                    value = OmegaConf.to_container(value, resolve=True)
            if asked:
                yield Typed((*path, key), str(child._value()), value)  # type: ignore[union-attr]
        elif isinstance(child, DictConfig | ListConfig):
            yield from _typed((*path, key), child)


@contextmanager
def _asked() -> Iterator[list[str]]:
    """The names of the environment variables that are read within this context, by interpolations of any depth."""
    names: list[str] = []

    def env(name: str, *default: Any) -> Any:
        names.append(name)
        return oc.env(name, *default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        yield names
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
