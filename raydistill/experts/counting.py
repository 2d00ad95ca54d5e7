"""Bytes that live and operations that are done while code runs, on real tensors or on those without data."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that came to be in the block and are still held; `peak` is the most at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: Any = WeakIdKeyDictionary()
        """Storage -> its size in a cell, 0 for what is not counted."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation. Storages that it was given are the caller's or known; others are new."""
        given = dict(kwargs or {})
        for x in tree_leaves((args, given)):
            if isinstance(x, Tensor):
                self._sizes.setdefault(x.untyped_storage(), [0])
        out = func(*args, **given)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage() not in self._sizes:
                self._add(x.untyped_storage())
        return out

    def leave_out(self, x: Tensor) -> None:
        """Count this tensor no more: gradients of parameters are an engine's, which divides them."""
        cell = self._sizes.get(x.untyped_storage(), [0])
        self.live -= cell[0]
        cell[0] = 0

    def _add(self, storage: torch.UntypedStorage) -> None:
        cell = self._sizes[storage] = [storage.nbytes()]
        self.live += cell[0]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, cell)

    def _free(self, cell: list[int]) -> None:
        self.live -= cell[0]


@contextmanager
def memory_efficient_attention() -> Iterator[None]:
    """Let attention on the meta device be of the kind that keeps no matrix of all pairs, as on any GPU.

    torch has no such kernel there and would count the matrix; it knows the shapes of the CPU's. A mode for
    functions would not do: it is off in the backward pass, where checkpoints run them again.
    """
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _efficient
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **more: Any
) -> Tensor:
    """Attention by the CPU's kernel; a mask of truth values becomes numbers, as in torch itself."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, attn_mask=attn_mask, scale=more.get("scale"))[0]


class CountedOperations(TorchDispatchMode):
    """Floating-point operations in the block by torch's own formulas; multiply and add are two.

    torch's FlopCounterMode holds what checkpoints would have freed, and refuses gradients of leaves.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        given = dict(kwargs or {})
        out = func(*args, **given)
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **given, out_val=out)
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""torch knows attention's kernels on GPUs; the one that it takes on a CPU does the same work."""
