"""What a compiled block keeps for its backward pass: what products and attention made, as recompute.py's blocks do.

Left alone, PyTorch's compiler also keeps the results of long chains of operations that it could compute again, 36 bytes
per token and channel of a block in BF16 instead of 24. Its memory budget cannot say otherwise: where tokens are few and
weights large, the compiler gives up products too.
"""

import operator

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
BACKWARD = ("is_backward", "must_be_in_backward")  # tags of nodes that are in the backward pass anyway


class KeepProducts(CustomPartitionerFn):
    """Splits a graph of both passes into one for each: results of products may be kept, all else is computed again."""

    def __call__(self, gm, joint_inputs, **kwargs):
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.meta.get("partitioner_tag") not in BACKWARD:
                policy = CheckpointPolicy.MUST_SAVE if _is_product(node) else CheckpointPolicy.PREFER_RECOMPUTE
                node.meta |= {"recompute": policy, "ac_graph_id": 0}  # one region; PyTorch compares their numbers
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self):
        """Names what this does to graphs, for the compiler's cache."""
        return get_hash_for_files((__file__,))


def _is_product(node):
    made_by = node.args[0] if node.target is operator.getitem else node
    return made_by.target in PRODUCTS or "attention" in str(made_by.target)
