"""What a run can draw so far: a contact sheet of EMA samples from the same noise each time."""

import torch

from EqM import samplers
from EqM.data import autoencoder as latents
from EqM.data import media
from EqM.engine import acceleration
from EqM.run import seeds

SAMPLES = 16
POINTS, STEPSIZE = 51, 0.0085  # 50 updates that go as far as the published 250 of 0.0017


class Preview:
    """Call it with a step: it writes `samples/0000100.png` beside the run's checkpoints.

    model: the averaged network. transport: what its output means. Nothing random of the run is touched.
    """

    def __init__(self, folder, args, model, transport, autoencoder, run_in, class_names):
        self.folder = folder / "samples"
        self.args = args
        self.model = model
        self.transport = transport
        self.autoencoder = autoencoder
        self.run_in = run_in
        labels = [i % len(class_names) for i in range(SAMPLES)]
        self.names = [class_names[label] for label in labels]
        self.labels = torch.tensor(labels, device=run_in.device)
        noise = [torch.randn(model.input_shape, generator=seeds.generator(args.global_seed, i)) for i in range(SAMPLES)]
        self.noise = torch.stack(noise).to(run_in.device)

    def _field(self, x, t, y):
        with self.run_in.autocast():
            return self.transport.field(self.model(x, t, y))

    @torch.no_grad()
    def __call__(self, step):
        guided = samplers.guided(self._field, self.labels, self.args.cfg_scale, self.args.num_classes)
        interval = self.transport.interval(self.transport.sample_eps)
        with acceleration.modulated_once(self.model):
            x = samplers.descend(guided, self.noise, POINTS, STEPSIZE, interval=interval)
        pixels = latents.to_uint8(self.autoencoder.decode(x)).cpu()
        frames = pixels if self.args.video else pixels.unsqueeze(2)  # (N, 3, T, H, W)
        self.folder.mkdir(exist_ok=True)
        sheet = media.contact_sheet(list(frames.permute(0, 2, 3, 4, 1).numpy()), self.names)
        sheet.save(self.folder / f"{step:07d}.png")
