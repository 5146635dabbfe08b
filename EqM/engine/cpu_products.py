"""16-bit matrix products on a CPU: with the units for them, and without."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

PRODUCTS = {  # what CPU autocast runs in 16 bits
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm, torch.Tensor.bmm,
    torch.addmm, torch.baddbmm, F.scaled_dot_product_attention,
}  # fmt: skip


class RoundedProducts(TorchFunctionMode):
    """16-bit matrix products on a CPU that has none: operands and results are rounded, sums are FP32.

    That is what tensor cores do, forward and (through the casts' own gradients) backward, overflow of FP16
    included. PyTorch's fallback for such CPUs is a scalar loop, tens of times slower than FP32.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = [self._rounded(value) for value in args]
            kwargs = {key: self._rounded(value) for key, value in kwargs.items()}
            return func(*args, **kwargs).to(self.dtype)

    def _rounded(self, value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self.dtype).float()
        return value


class ProductAttention(TorchFunctionMode):
    """Attention in 16 bits on a CPU, where gradients are wanted: two matrix products round an FP32 softmax.

    PyTorch's fused kernel does the same without keeping the L x L weights, but its backward pass computes without the
    CPU's 16-bit units and takes longer. Scores in 16 bits would be faster still, at twice the error or more.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled() and not kwargs:
            q, k, v = args
            with torch.autocast("cpu", enabled=False):
                scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)
                return torch.softmax(scores, dim=-1).to(v.dtype) @ v
        return func(*args, **(kwargs or {}))
