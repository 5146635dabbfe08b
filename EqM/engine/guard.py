"""Whether a step is taken, and when a run is beyond saving."""

import torch

from EqM.run.errors import UserError


class StepGuard:
    """Whether steps were taken or skipped, counted on the device; decides when a run is beyond saving.

    A step whose gradients are not finite changes nothing, in any precision: the fused optimizer skips inside
    its kernel. FP16 recovers by itself, since the scaler halves its scale. BF16 and FP32 have no such remedy.
    """

    MAX_STREAK = 50  # skips in a row; from the first scale of 65536, 17 would bring it below 1

    def __init__(self, precision):
        self.precision = precision
        self.skipped = torch.zeros((), device=precision.device)
        self.streak = torch.zeros((), device=precision.device)

    def judge(self, grad_norm):
        """grad_norm: 0-dim, of the gradients of the loss itself. Returns 1.0 if it is finite, and the step is to be
        taken, else 0.0, 0-dim. See `tell`.
        """
        applied = torch.isfinite(grad_norm).float()
        self.skipped += 1 - applied
        self.streak = (self.streak + 1) * (1 - applied)
        return applied

    @staticmethod
    def tell(applied, optimizer, scaler):
        """Make what was judged the verdict of the fused optimizer and of a GradScaler that has unscaled its gradients.

        Left alone, the scaler looks at each gradient and not at the norm, which overflows where they do not: then
        weights would move and EMA and schedule would not.
        """
        if not scaler.is_enabled():
            optimizer.found_inf = 1 - applied  # skips inside its kernel, so nobody has to ask
            return
        for found in scaler._found_inf_per_device(optimizer).values():  # there is no public way to it
            found.copy_(1 - applied)

    def state_dict(self):
        return {"skipped": self.skipped, "streak": self.streak}

    def load_state_dict(self, state):
        self.skipped.copy_(state["skipped"])
        self.streak.copy_(state["streak"])

    def check(self, step, scale):
        """Number of skipped steps so far; waits for the device. Raises UserError if going on is no use."""
        skipped, streak = torch.stack([self.skipped, self.streak]).int().tolist()
        if self.precision.name != "fp16" and skipped:
            raise UserError(
                f"step {step}: loss or gradients are not finite in {self.precision.name.upper()}; the weights are as "
                f"before it and the last checkpoint is good. Try a smaller --lr, --warmup-steps or --max-grad-norm 1"
            )
        if streak >= self.MAX_STREAK or scale < 1:
            raise UserError(
                f"step {step}: FP16 skipped {streak} steps in a row and its scale fell to {scale:g}; the last "
                f"checkpoint is good. Try --use-bf16, a smaller --lr or --max-grad-norm 1"
            )
        return skipped
