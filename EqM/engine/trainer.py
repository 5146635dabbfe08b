"""A training step, the same in every precision: autocast and the scaler do nothing where they are not needed."""

from contextlib import nullcontext

import torch

from EqM.engine import optimizer as optim
from EqM.engine import prepare
from EqM.engine.ema import EMA
from EqM.engine.guard import StepGuard
from EqM.run import checkpoint
from EqM.transport import C_DEFAULTS, Transport, dispersive_loss


class Trainer:
    """A model with everything that changes it, and the step they make together, the same in every precision.

    args: lr, ema_decay, max_grad_norm and the rest of what train.py's flags settle. model: on its device, in FP32.
    run_in: the Precision. ranks: the processes that step together, None for this one. tell: called with a line where a
    flag has no effect.
    network: the model as it is called.
    """

    def __init__(self, args, model, run_in, total_steps, ranks=None, tell=print):
        self.args = args
        self.run_in = run_in
        self.total_steps = total_steps
        self.model = model
        # Copies of the network before anything is done to it.
        self.ema = EMA(model, args.ema_decay, args.ema_warmup, args.ema_std or ())
        self.network = prepare.for_training(model, run_in, args, ranks, tell, averages=list(self.ema.models.values()))
        self.ema.follow(model)
        self.optimizer = optim.make(args.optimizer, model, args.lr, args.betas, args.weight_decay)
        self.schedule = optim.Schedule(
            self.optimizer, args.lr_schedule, args.warmup_steps, total_steps, run_in.device, args.min_lr
        )
        self.scaler = run_in.grad_scaler()
        self.guard = StepGuard(run_in)
        c = {name: getattr(args, name) for name in C_DEFAULTS}
        self.transport = Transport(
            args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps, **c
        )

    def parts(self):
        """What a checkpoint keeps, by its key there."""
        return {
            "model": self.model, **self.ema.parts(), "opt": self.optimizer, "scaler": self.scaler,
            "schedule": self.schedule, "guard": self.guard,
        }  # fmt: skip

    def restore(self, saved, path):
        """Load every part that a checkpoint has; returns the step it was saved at, 0 for published weights.

        saved: as checkpoint.load gives it, from path. Raises UserError if it does not fit.
        """
        parts = self.parts()
        checkpoint.load_weights(parts["model"], saved["model"], path, saved["args"])
        averages = checkpoint.averages(saved)
        for name, average in self.ema.models.items():
            checkpoint.load_weights(average, averages.get(name, saved["ema"]), path, saved["args"])
        if "step" not in saved:  # published: the weights alone are a start
            return 0
        if self.ema.counts:  # an average that is new to the run is as old as the run
            self.ema.load_state_dict(saved.get("averaging") or {"updates": checkpoint.steps_taken(saved)})
        if "opt" in saved:
            checkpoint.load_optimizer(parts["opt"], saved["opt"])
        same_precision = saved.get("precision") == self.run_in.name
        # FP16's skipped steps are no fault in another precision, where one skip ends a run.
        for name in ("scaler", "schedule", *(["guard"] if same_precision else [])):
            if saved.get(name):  # a scaler that was off has nothing to say
                parts[name].load_state_dict(saved[name])
        return saved["step"]

    def step(self, stream):
        """Train on the next micro-batches of a stream of (latents, labels), without waiting for the device.

        Returns (loss, gradient norm, applied), 0-dim tensors: applied is 1.0, or 0.0 if the step was skipped.
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for left in reversed(range(self.args.grad_accum_steps)):
            x1, y = next(stream)
            point = self.transport.sample(x1)
            with self.network.no_sync() if left and self.network is not self.model else nullcontext():
                with self.run_in.autocast():  # 16-bit begins and ends here: losses are FP32
                    output, acts = self.network(point.xt, point.t, y, return_act=True)
                loss = self.transport.loss(output, point).mean()
                if self.args.disp:
                    loss = loss + 0.5 * dispersive_loss(acts[-1])
                self.scaler.scale(loss / self.args.grad_accum_steps).backward()
            losses.append(loss.detach())
            del output, acts, loss  # else they would live through the next forward pass

        self.scaler.unscale_(self.optimizer)  # before the norm, so that clipping sees gradients of the loss itself
        grad_norm = optim.clip_gradients(self.model, self.args.max_grad_norm)
        applied = self.guard.judge(grad_norm)
        self.guard.tell(applied, self.optimizer, self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.advance(applied)
        self.ema.update(applied)
        return torch.stack(losses).mean(), grad_norm, applied
