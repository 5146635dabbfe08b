"""A card that is not there: code runs on tensors that have shape, dtype and device, and no values.

PyTorch's FakeTensorMode computes what shape and dtype each operation gives on which device, refuses operations that mix
devices, and cannot read a value. What it leaves to a driver is answered here: that there is a card, what it can do,
which attention kernel PyTorch picks on it, and backward passes (see backward.py). It says nothing of numbers.
"""

import warnings
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from EqM.engine import ema
from EqM.measure import backward

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
AMPERE, VOLTA = (8, 0), (7, 0)  # the first with BF16 units and flash attention, the first with units for FP16

_MOVES = {aten._to_copy.default, aten.copy_.default, torch.ops.prims.device_put.default}
_FUSED = "EqM.engine.fused.obstacle", lambda *_: None  # which would run them, and look at what they give
_FOREACH = "torch.utils._foreach_utils._foreach_supported_types"


class HostWait(RuntimeError):
    """The host would have waited for the card: a value was read, or moved to the CPU."""


@contextmanager
def fake_tensors(on_gradient=lambda parameter: None):
    """Within it all new tensors are fake, and backward passes and conversions of networks work on them.

    on_gradient: see backward.in_python. Tensors and networks from outside may not be used within, nor those from
    within outside.
    """
    with (
        warnings.catch_warnings(),
        _NoDriver(),
        mock.patch("torch.nn.Module._apply", _apply),
        # Lists of plain tensors go through multi-tensor kernels, and fake ones stand for plain ones.
        mock.patch(_FOREACH, [torch.Tensor, torch.nn.Parameter, FakeTensor]),
        backward.in_python(on_gradient),
    ):
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copies of networks do
        yield


@contextmanager
def fake_cuda(capability=(9, 0), strict=True, on_gradient=lambda parameter: None):
    """Within it cuda:0 is there, with this compute capability, and all tensors are fake; gives its `Border`.

    strict: raise HostWait where the host would wait for the card. on_gradient: see fake_tensors.
    """
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "a card that is not there",
        "get_device_capability": lambda device=None: capability,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= AMPERE,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
    }
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    border = Border(capability, strict)
    try:
        with ExitStack() as stack:
            for function, answer in answers.items():
                stack.enter_context(mock.patch(f"torch.cuda.{function}", answer))
            stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", border.attention))
            stack.enter_context(mock.patch(*_FUSED))
            stack.enter_context(fake_tensors(on_gradient))
            stack.enter_context(border)
            yield border
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def like_cuda(capability, on_gradient=lambda parameter: None):
    """For PyTorch without CUDA, whose graphs take no tensors of a card: fake CPU tensors, and a card's kernels.

    Attention and multi-tensor kernels are those of a card. Autocast is the CPU's, which does with the network's
    operations what a card's does; the autoencoder's norms it leaves in 16 bits, where a card's has FP32.
    """
    border = Border(capability, strict=False, card="cpu")
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", border.attention),
        mock.patch(*_FUSED),
        mock.patch("EqM.engine.ema._lerp", ema._fused_lerp),
        mock.patch("torch.utils._foreach_utils._get_foreach_kernels_supported_devices", lambda: ["cpu"]),
        fake_tensors(on_gradient),
        border,
    ):
        yield


@contextmanager
def fake_cpu(on_gradient=lambda parameter: None):
    """A CPU whose tensors are fake: fake_tensors, of which what is read is 1, or True."""
    with fake_tensors(on_gradient), Border(AMPERE, strict=False, card="cpu"):
        yield


class _NoDriver(FakeTensorMode):
    avoid_device_init = True  # keeps away from the driver, whatever torch.cuda.is_available was made to say

    def __deepcopy__(self, memo):
        return self  # a copied tensor is of the same mode

    def dispatch(self, func, types, args=(), kwargs=None):
        if func in FUSED:
            _check_devices(func, args[: FUSED[func]])
            return None  # it works in place
        return super().dispatch(func, types, args, kwargs)


# How many lists of tensors come first. PyTorch has no fake of those whose rate is a tensor.
FUSED = {
    aten._fused_adamw_.default: 5, aten._fused_adamw_.tensor_lr: 5, aten._fused_sgd_.tensor_lr: 3,
}  # fmt: skip


def _check_devices(func, lists):
    devices = {tensor.device for each in lists for tensor in each}
    if len(devices) > 1:
        raise RuntimeError(f"{func} on {', '.join(sorted(map(str, devices)))}")


def _apply(module, convert, recurse=True):
    """nn.Module._apply for fake tensors, which can neither be swapped nor be given other data."""
    for child in module.children() if recurse else ():
        _apply(child, convert)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None and (converted := convert(parameter)) is not parameter:
                module._parameters[name] = torch.nn.Parameter(converted, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else convert(buffer)
    return module


class Border(TorchDispatchMode):
    """Between host and card: what crosses it, and which attention kernels were picked.

    attentions: their names, in order. uploads: how often a tensor went from the CPU to the card. waits: how often the
    host would have waited for the card, which raises HostWait if strict; else all that is read is 1, or True.
    """

    def __init__(self, capability, strict, card="cuda"):
        super().__init__()
        self.card = card
        self.capability = capability
        self.strict = strict
        self.attentions = []
        self.uploads = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default and not (self.strict and args[0].device.type == "cpu"):
            if args[0].device.type == self.card:
                self._wait("a value was read")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **(kwargs or {}))
        if func in _MOVES:
            target, source = (result, args[1]) if func is aten.copy_.default else (result, args[0])
            self.uploads += source.device.type == "cpu" and target.device.type == "cuda"
            if source.device.type == "cuda" and target.device.type == "cpu":
                self._wait(f"values of {tuple(source.shape)} were moved to the CPU")
        return result

    def _wait(self, why):
        self.waits += 1
        if self.strict:
            raise HostWait(why)

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        """F.scaled_dot_product_attention by the kernel that PyTorch would pick on this card."""
        if attn_mask is not None or dropout_p or is_causal:
            raise NotImplementedError("attention with a mask or dropout")
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
        name = self._kernel(query)
        self.attentions.append(name)
        return _KERNELS[name](query, key, value)

    def _kernel(self, query):
        """As sdp_utils.cpp decides for plain attention. Where it prefers cuDNN's kernel, that is called flash here: it
        keeps as much.
        """
        half, head = query.itemsize == 2, query.shape[-1]
        ampere = self.capability >= AMPERE
        if torch.backends.cuda.flash_sdp_enabled() and half and ampere and head % 8 == 0 and head <= 256:
            return "flash"
        step = 8 if half and self.capability >= VOLTA else 4 if ampere else 1
        built = ampere or query.dtype != torch.bfloat16
        if torch.backends.cuda.mem_efficient_sdp_enabled() and built and head % step == 0:
            return "efficient"
        return "math"


def _flash(query, key, value):
    return aten._scaled_dot_product_flash_attention(query, key, value)[0]


def _efficient(query, key, value):
    graded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, None, compute_log_sumexp=graded)[0]


def _math(query, key, value):
    return aten._scaled_dot_product_attention_math(query, key, value)[0]


_KERNELS = {"flash": _flash, "efficient": _efficient, "math": _math}
