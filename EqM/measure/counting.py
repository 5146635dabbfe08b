"""What operations cost, counted as they pass: memory that is held, kernels, bytes that are moved, products.

Works on real and on fake tensors. Bytes are those of tensors; what a kernel takes for itself while it runs is added for
attention, where it is large (see `_scratch`).
"""

import math
import weakref
from collections import Counter, defaultdict

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
BLOCK = 512  # bytes; CUDA's allocator rounds each tensor up to these

SILENT = {  # no view, and no kernel either
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten.lift_fresh.default, aten.set_.source_Storage,
    aten.is_non_overlapping_and_dense.default,
}  # fmt: skip
FILLS = {"fill_", "zero_", "copy_", "normal_", "uniform_", "random_"}  # write what they are given without reading it
FUSED = ("_fused_adamw_", "_fused_sgd_")
GATHERS = {"embedding", "gather", "index", "index_select"}  # read as much as they write
# What one launch of a multi-tensor kernel takes (MultiTensorApply.cuh): tensors of each list, by the number of lists;
# blocks; elements of a block.
TENSORS, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 65_536


class Count(TorchDispatchMode):
    """Counts what passes on a type of device (cuda, cpu) while it is entered.

    part: what new memory is for; `mark` says it later. held, most: bytes now and the most so far, by part. peak: the
    most of all parts at one moment. kernels, by_name: operations that are no views, multi-tensor ones by the launches
    they take. moved: bytes that operations other than products read and write, each operand once. products:
    floating-point operations by (kind, dtype).
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.part = "activations"
        self.held = Counter()
        self._sizes = {}  # id of a storage: (weak reference, part, bytes)
        self.reset()

    def reset(self):
        """Count from here on; memory that is held stays."""
        self.most = Counter(self.held)
        self.peak = self.total = sum(self.held.values())
        self.moved = 0
        self.products = defaultdict(int)
        self.by_name = Counter()

    @property
    def kernels(self):
        return self.by_name.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        for tensor in made:
            self._hold(tensor)
        if func in SILENT or func.is_view or func.namespace == "profiler":
            return result
        name = func._schema.name.removeprefix("aten::")
        self._took(_scratch(name, args))
        self.by_name[name] += launches(name, args)
        if func._overloadpacket in flop_registry:
            operations = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            kind = "convolution" if "convolution" in name else "attention" if "attention" in name else "matrix"
            self.products[kind, args[0].dtype] += operations
        else:
            self.moved += traffic(func, name, args, kwargs, made)
        return result

    def mark(self, tensors, part):
        """Say what these tensors' memory is for."""
        for tensor in tensors:
            key = id(tensor.untyped_storage())
            if key in self._sizes:
                reference, before, size = self._sizes[key]
                self._sizes[key] = reference, part, size
                self.held[before] -= size
                self._add(part, size, total=False)

    def _hold(self, tensor):
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._sizes[key] = weakref.ref(storage, lambda _: self._freed(key)), self.part, size
        self._add(self.part, size)

    def _freed(self, key):
        _, part, size = self._sizes.pop(key)
        self.held[part] -= size
        self.total -= size

    def _add(self, part, size, total=True):
        self.held[part] += size
        self.most[part] = max(self.most[part], self.held[part])
        self.total += size * total
        self.peak = max(self.peak, self.total)

    def _took(self, size):
        """Memory that is there and gone within one kernel."""
        if size:
            self._add(self.part, size)
            self.held[self.part] -= size
            self.total -= size


def once_a_chunk(function, count):
    """A function of chunks (n, ...) that runs once for each shape: later, what it took then is counted without running.

    It gives a tuple of tensors (n, ...), of any values where it did not run, and keeps no other memory. What is
    returned takes another argument, the size of a chunk: many that follow one of it may come together, (k size, ...).
    """
    known = {}  # by shape: (kernels, bytes moved, products, bytes at most beside the results, results as _described)

    def run(x):
        kernels, moved, products = Counter(count.by_name), count.moved, Counter(count.products)
        peak, count.peak = count.peak, count.total
        results = function(x)
        taken = Counter(count.by_name) - kernels, count.moved - moved, Counter(count.products) - products
        known[x.shape] = (*taken, count.peak - count.total, [_described(each) for each in results])
        count.peak = max(peak, count.peak)
        return results

    def call(x, size):
        shape = torch.Size((min(len(x), size), *x.shape[1:]))
        if shape not in known:
            return run(x)
        times = len(x) // shape[0]
        kernels, moved, products, most, results = known[shape]
        for name, launched in kernels.items():
            count.by_name[name] += times * launched
        for key, operations in products.items():
            count.products[key] += times * operations
        count.moved += times * moved
        made = tuple(
            torch.empty(times * held, dtype=dtype, device=x.device)[: times * size].view(-1, *rest)
            for held, size, dtype, rest in results
        )
        count._took(most)
        return made

    return call


def _described(tensor):
    """(elements of its storage, its own, dtype, shape but for the first dimension)."""
    return tensor.untyped_storage().nbytes() // tensor.itemsize, tensor.numel(), tensor.dtype, tensor.shape[1:]


def traffic(func, name, args, kwargs, made):
    """Bytes that an operation must read and write: every operand once, a broadcast one as often as it stands there."""
    written, read = [], []
    given = list(zip(func._schema.arguments, args, strict=False))
    given += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    for argument, value in given:
        tensors = [tensor for tensor in tree_leaves(value) if isinstance(tensor, torch.Tensor)]
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and not (name in FUSED and argument.name == "grads"):  # which only a scaler's are
            written += tensors
        if not (writes and (name in FILLS or argument.is_out)):
            read += tensors
    written += [] if written else made
    moved = sum(map(_bytes, written))
    return moved + (moved if name in GATHERS else sum(map(_bytes, read)))


def _bytes(tensor):
    """Of the elements that are there: expanded dimensions once."""
    return math.prod(size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.itemsize


def launches(name, args):
    """Kernels of one operation. Lists of tensors that match each other go many at a time, others one by one."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and each and isinstance(each[0], torch.Tensor)]
    if not lists or not name.startswith(("_foreach", "_fused", "_amp_foreach")):
        return 1
    if name in FUSED:
        lists = lists[:4]  # the steps' counts travel beside them
    if any(a.shape != b.shape for each in lists[1:] for a, b in zip(lists[0], each, strict=True)):
        return len(lists[0])
    most, count, tensors, blocks = TENSORS[min(len(lists), len(TENSORS)) - 1], 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        chunks = -(-tensor.numel() // CHUNK)
        count += (blocks + chunks) // BLOCKS
        blocks = (blocks + chunks) % BLOCKS
        if tensors == most:
            count, tensors, blocks = count + bool(blocks), 0, 0
    return count + bool(blocks)


def _scratch(name, args):
    """Bytes that an attention kernel takes for itself on a GPU: the query's gradient in FP32, and a sum of each row."""
    if name == "_scaled_dot_product_flash_attention_backward":
        N, heads, L, head = args[1].shape
        return N * heads * _up(L, 128) * (_up(head, 32) + 1) * 4
    if name == "_scaled_dot_product_efficient_attention_backward":
        N, heads, L, head = args[1].shape
        return N * heads * L * (head * (args[1].itemsize < 4) + 1) * 4
    return 0


def _up(size, step):
    return -(-size // step) * step
