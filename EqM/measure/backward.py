"""Backward passes in Python, over the graph that PyTorch recorded.

PyTorch's own engine asks the driver for a card's streams before it runs, and so fails where fake tensors stand for a
card that is not there. This one calls the graph's nodes in the same order, adds gradients where that one adds them, and
lets go of what a node has saved as soon as the node has run: the same operations, with the same tensors alive.

Left out: hooks on tensors and nodes, which nothing of ours sets on one rank. Where a node gives gradients of weights
beside the one that `torch.autograd.grad` wants, it computes them here, and in PyTorch's engine it does not.
"""

import heapq
from contextlib import contextmanager
from unittest import mock

import torch

GRAPH_TASK = 0  # the number of the backward pass that is running, which recomputation asks for


@contextmanager
def in_python(on_gradient=lambda parameter: None):
    """Within it, tensor.backward(), torch.autograd.backward and torch.autograd.grad run here.

    on_gradient: called with each parameter whose .grad was None and is not.
    """
    engine = _Engine(on_gradient)
    with (
        torch.autograd.graph.saved_tensors_hooks(engine.saved.pack, engine.saved.unpack),
        mock.patch("torch.autograd.backward", engine.backward),
        mock.patch("torch.autograd.grad", engine.grad),
        mock.patch("torch._C._current_graph_task_id", lambda: GRAPH_TASK if engine.depth else -1),
    ):
        yield


class _Saved:
    """What nodes keep for the backward pass. A node that has run does not ask again: what it read is let go."""

    def __init__(self):
        self.read = []

    def pack(self, tensor):
        return [tensor.detach()]  # a result that knows its node, kept by that node, would never be freed

    def unpack(self, cell):
        if not cell:
            raise RuntimeError("a graph was run backward a second time, and what it had saved is gone")
        self.read.append(cell)
        return cell[0]

    def release(self, since):
        for cell in self.read[since:]:
            cell.clear()
        del self.read[since:]


class _Engine:
    def __init__(self, on_gradient):
        self.saved = _Saved()
        self.on_gradient = on_gradient
        self.depth = 0

    def backward(self, tensors, grad_tensors=None, retain_graph=None, create_graph=False, *_, **__):
        self._run(tensors, grad_tensors, retain_graph, create_graph, ())

    def grad(self, outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, *_, **__):
        return self._run(outputs, grad_outputs, retain_graph, create_graph, _edges(_as_list(inputs)))

    def _run(self, outputs, grads, retain_graph, create_graph, wanted):
        outputs = _as_list(outputs)
        grads = [None] * len(outputs) if grads is None else _as_list(grads)
        task = _Task(self, _edges(outputs), wanted, keep=create_graph if retain_graph is None else retain_graph)
        self.depth += 1
        try:
            with torch.set_grad_enabled(create_graph):
                return task.run([torch.ones_like(x) if g is None else g for x, g in zip(outputs, grads, strict=True)])
        finally:
            self.depth -= 1


def _as_list(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _edges(tensors):
    """(node, number of its output) of each tensor."""
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in tensors]
    return [(edge.node, edge.output_nr) for edge in edges]


class _Task:
    """One backward pass. A node waits for all of its gradients; of those that are ready, the newest is next.

    wanted: edges whose gradients are returned, and then no leaf is touched; if empty, leaves get theirs.
    """

    def __init__(self, engine, roots, wanted, keep):
        self.engine = engine
        self.roots = roots
        self.wanted = wanted
        self.found = {}
        self.keep = keep
        self.waits = _waits([node for node, _ in roots], [node for node, _ in wanted])
        self.ready = []
        self.inputs = {}  # node: [(gradient, whether it is nobody else's) or None, for each output of the node]

    def run(self, starts):
        for (node, at), grad in zip(self.roots, starts, strict=True):
            self._hand(node, at, grad, own=False)
        for node in {node for node, _ in self.roots}:
            if not self.waits.get(node, 1):
                heapq.heappush(self.ready, _Ready(node))
        self.roots = starts = grad = node = None
        while self.ready:
            node = heapq.heappop(self.ready).node
            self._step(node)
            self.waits.pop(node)
        return tuple(self.found.get(edge) for edge in self.wanted)

    def _step(self, node):
        inputs = self.inputs.pop(node, None) or [None] * len(node._input_metadata)
        grads = [given and given[0] for given in inputs]
        self.found |= {(node, at): grad for at, grad in enumerate(grads) if (node, at) in self.wanted}
        edges = node.next_functions
        if self.wanted and not any(after in self.waits for after, _ in edges):
            return
        if type(node).__name__ == "AccumulateGrad":
            _accumulate(node.variable, *inputs[0], self.engine.on_gradient)
            return
        mark = len(self.engine.saved.read)
        results = _call(node, grads)
        if not self.keep:
            self.engine.saved.release(mark)
        inputs.clear()
        grads.clear()
        twice = [sum(other is grad for other in results) > 1 for grad in results]
        for i, (after, at) in enumerate(edges):
            grad, results[i] = results[i], None
            if after not in self.waits:
                continue
            if grad is not None:
                self._hand(after, at, _fitted(grad, after._input_metadata[at]), own=not twice[i])
            grad = None
            self.waits[after] -= 1
            if not self.waits[after]:
                heapq.heappush(self.ready, _Ready(after))

    def _hand(self, node, at, grad, own):
        """Give a node one more gradient of its output number `at`. own: nobody else has it, so it may be added to."""
        inputs = self.inputs.setdefault(node, [None] * len(node._input_metadata))
        inputs[at] = (grad, own) if inputs[at] is None else (_sum(*inputs[at], grad, own), True)


def _waits(roots, wanted):
    """{node: how many gradients it waits for}, of all nodes from roots on, or of those that lead to wanted ones."""
    before, stack = dict.fromkeys(roots, ()), list(roots)
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions:
            if after is None:
                continue
            if after not in before:
                before[after] = []
                stack.append(after)
            before[after] = [*before[after], node]
    if not wanted:
        return {node: len(earlier) for node, earlier in before.items()}
    needed, stack = {}, list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed[node] = len(before[node])
            stack += before[node]
    return needed


class _Ready:
    """A node on the heap: leaves first, then the newest."""

    def __init__(self, node):
        self.node = node
        self.rank = node._sequence_nr()

    def __lt__(self, other):
        return self.rank > other.rank


def _call(node, grads):
    """Gradients, one for each of node.next_functions."""
    if not isinstance(node, torch._C._FunctionBase):
        results = node(*grads)
        return list(results) if isinstance(results, tuple) else [results]
    # A torch.autograd.Function of Python, whose backward gives one result for each argument of its forward.
    given = [
        torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device) if grad is None else grad
        for grad, meta in zip(grads, node._input_metadata, strict=True)
    ]
    results = node.apply(*given)
    results = results if isinstance(results, tuple) else (results,)
    needed = iter([grad for grad, asked in zip(results, node.needs_input_grad, strict=False) if asked])
    return [None if after is None else next(needed) for after, _ in node.next_functions]


def _fitted(grad, meta):
    """A gradient made to fit what it is the gradient of, as PyTorch's engine does it."""
    if grad.device != meta.device:
        raise RuntimeError(f"a gradient on {grad.device} of a tensor on {meta.device}")
    if tuple(grad.shape) != tuple(meta.shape):
        grad = grad.sum_to_size(tuple(meta.shape))
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)


def _alone(tensor):
    """Whether no other tensor shares this one's memory, of which it is all."""
    held = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # twice: by the tensor, and here
    return held == 2 and torch.ops.aten.is_non_overlapping_and_dense(tensor)


def _sum(old, own_old, new, own_new):
    if not torch.is_grad_enabled():
        if own_new and _alone(new):
            return new.add_(old)
        if own_old and _alone(old):
            return old.add_(new)
    return old + new


def _accumulate(parameter, grad, own, on_gradient):
    if parameter.grad is not None:
        parameter.grad.add_(grad)
        return
    stolen = own and grad.stride() == parameter.stride()
    parameter.grad = grad.detach() if stolen else torch.empty_like(parameter).copy_(grad)
    on_gradient(parameter)
