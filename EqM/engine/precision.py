"""Mixed precision, decided once and wrapped round the network from outside.

Weights, optimizer state, EMA, checkpoints and every sum that a small number could drown in are FP32. Only what
runs inside `Precision.autocast` is 16-bit, and of the EqM network there only the products of attention and MLPs,
where the time goes. BF16 has FP32's range and needs nothing more. FP16 has more digits but loses gradients under
6e-8, so a GradScaler multiplies the loss before the backward pass and divides the gradients after it.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn as nn

from EqM.engine.cpu_products import ProductAttention, RoundedProducts
from EqM.run.errors import UserError

FLAGS = {"fp32": [], "bf16": ["--use-bf16"], "fp16": ["--use-amp"]}
ISLANDS = ("x_embedder", "t_embedder", "adaLN_modulation", "final_layer")  # FP32 parts of the network, see keep_islands
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_flags(parser):
    """--use-amp, --use-bf16 and what goes with them, on an argparse parser."""
    group = parser.add_argument_group("precision (default: FP32)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--use-bf16", action="store_true", help="autocast to bfloat16")
    either.add_argument("--use-amp", action="store_true", help="autocast to float16; training scales the loss")
    group.add_argument("--no-tf32", action="store_true", help="CUDA: keep FP32 products at 24 bits, not TF32's 11")
    group.add_argument(
        "--vae-precision", choices=("same", "fp32"), default="same", help="of the autoencoder: as the network, or FP32"
    )


@dataclass(frozen=True)
class Precision:
    """A dtype, the device it is for, and why it runs the way it does.

    name: fp32, bf16 or fp16. reason: for the log. rounded: this CPU has no instructions for the dtype, so
    products are rounded to it but computed in FP32 (see RoundedProducts).
    """

    name: str
    device: torch.device
    reason: str
    rounded: bool = False

    @property
    def dtype(self):
        return DTYPES[self.name]

    def in_fp32(self):
        """Plain FP32 on the same device."""
        return fp32(self.device)

    @contextmanager
    def autocast(self):
        """Run the network here; keep losses, sums and weight updates outside."""
        if self.device.type != "cpu" or self.name == "fp32":
            cpu_mode = nullcontext()
        else:
            cpu_mode = RoundedProducts(self.dtype) if self.rounded else ProductAttention()
        with torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32"), cpu_mode:
            yield

    def grad_scaler(self):
        """A GradScaler, which does nothing unless the precision is FP16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def keep_islands(self, network):
        """Keep an EqM network's ends and its conditioning in FP32, in place, whatever autocast surrounds them.

        They are 0.2 % of the operations of EqM-XL/2 and most of the error: shift, scale and gate are the same at every
        step of a sampler, so that their rounding adds up where that of attention and MLPs averages out.
        Raises LookupError if the network has no module of one of these names: it would be 16-bit unnoticed.
        """
        parts = {name.split(".")[-1] for name, _ in network.named_modules()}
        missing = [name for name in ISLANDS if name not in parts]
        if missing:
            raise LookupError(f"the network has no {', '.join(missing)}, which precision.ISLANDS keeps in FP32")
        if self.name == "fp32":
            return network
        # Methods, not closures: a deep copy of the network binds its own.
        for name, module in network.named_modules():
            if name.split(".")[-1] in ISLANDS:
                module.forward = MethodType(_forward_in_fp32, module)
        if network.ebm != "none":  # its field is a gradient, in which autocast would round the islands' products
            network.forward = MethodType(_forward_in_fp32, network)
            network.network = MethodType(self._network_in_autocast, network)
        return network

    def _network_in_autocast(self, model, x, t, y):
        with self.autocast():
            return type(model).network(model, x, t, y)

    def cast_weights(self, module):
        """Cast a frozen module's Linear and Conv weights in place, as autocast would at every single call.

        The results are bit-identical; the casts are saved, and half of these weights' memory. Islands stay FP32.
        """
        if self.name == "fp32":
            return module
        for name, layer in module.named_modules():
            in_island = not set(ISLANDS).isdisjoint(name.split("."))
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not in_island:
                layer.to(self.dtype)
        return module


def _forward_in_fp32(module, *args, **kwargs):
    with torch.autocast(args[0].device.type, enabled=False):
        return type(module).forward(module, *args, **kwargs)


def name_of(args):
    """The precision that the flags ask for: fp32, bf16 or fp16."""
    return "bf16" if args.use_bf16 else "fp16" if args.use_amp else "fp32"


def activate_flags(args, device):
    """The Precision that the flags ask for: see activate."""
    return activate(name_of(args), device, tf32=not args.no_tf32)


def activate(name, device, tf32=True):
    """The Precision of this name on this device; on a GPU, TF32 is switched for the whole process as it wants it.

    tf32: whether FP32 products may be TF32. Raises UserError if the GPU has no BF16.
    """
    if device.type == "cuda":
        # Only ever set, never read: reading raises once the old and the new API have both been used.
        # In a 16-bit run FP32 products are the islands', whose digits count.
        torch.set_float32_matmul_precision("high" if tf32 and name == "fp32" else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        card = torch.cuda.get_device_name(device)
        if name == "bf16":
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(f"--use-bf16: {card} has no BF16 units; --use-amp runs in FP16 there")
            return Precision("bf16", device, f"BF16 autocast on {card}, no gradient scaling needed")
        if name == "fp16":
            return Precision("fp16", device, f"FP16 autocast on {card}, with gradient scaling")
        products = "TF32 where the card has it" if tf32 else "IEEE FP32 (--no-tf32)"
        return Precision("fp32", device, f"FP32 on {card}, matrix products in {products}")

    if name == "fp32":
        return Precision(name, device, f"FP32 on {device.type}, no TF32 there")
    kind = name.upper() + " autocast" + (" with gradient scaling" if name == "fp16" else "")
    if device.type != "cpu":
        return Precision(name, device, f"{kind} on {device.type}")
    if _cpu_computes(name):
        return Precision(name, device, f"{kind} on a CPU that computes in {name.upper()}")
    slow = f"a CPU without {name.upper()} units: same rounding, but slower than FP32"
    return Precision(name, device, f"{kind} on {slow}", rounded=True)


def of_vae(args, run_in):
    """The Precision of the autoencoder: the network's, or FP32 with --vae-precision fp32."""
    return fp32(run_in.device) if args.vae_precision == "fp32" else run_in


def fp32(device):
    """Plain FP32 on a device."""
    return Precision("fp32", device, "FP32")


def _cpu_computes(name):
    """Whether PyTorch's CPU library multiplies matrices in this dtype, rather than by a scalar loop."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return supported is not None and torch.backends.mkldnn.is_available() and supported()
