"""What layers give during a pass, taken as they give it."""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def tapped(layers: Mapping[Hashable, nn.Module]) -> Iterator[dict[Hashable, Any]]:
    """Collect what each layer gives in the block, the last time it is called, by the layer's key."""
    given: dict[Hashable, Any] = {}

    def keep(key: Hashable, _layer: nn.Module, _inputs: object, out: Any) -> None:
        given[key] = out

    hooks = [layer.register_forward_hook(partial(keep, key)) for key, layer in layers.items()]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()
