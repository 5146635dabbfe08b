"""What a run can draw so far: a contact sheet of EMA samples from the same noise each time."""

from functools import partial
from itertools import takewhile

from EqM.data import media
from EqM.pipeline import EqMPipeline

SAMPLES = 16
POINTS, STEPSIZE = 51, 0.0085  # 50 updates that go as far as the published 250 of 0.0017


class Preview:
    """Call it with a step: it writes `samples/0000100.png` beside the run's checkpoints.

    folder: the run's; None on ranks that only take part, each with its part of the averages. averaged: the averaged
    network, ready to be called. Nothing random of the run is touched.
    is_stopped: asked at each update whether to leave the sheet out.
    """

    def __init__(self, folder, args, trainer, averaged, autoencoder, class_names):
        self.folder = folder and folder / "samples"
        self.is_stopped = lambda: False
        self.cfg_scale = args.cfg_scale
        self.pipe = EqMPipeline(averaged, trainer.run_in, autoencoder, trainer.transport, class_names)
        self.labels = [i % len(class_names) for i in range(SAMPLES)]
        self.names = [class_names[label] for label in self.labels]
        self.noise = self.pipe.noise(range(SAMPLES), args.global_seed)

    def __call__(self, step):
        x = self.pipe.descend(
            self.noise, self.labels, num_sampling_steps=POINTS, stepsize=STEPSIZE, cfg_scale=self.cfg_scale,
            progress=partial(takewhile, lambda update: not self.is_stopped()),
        )  # fmt: skip
        if self.folder is None or self.is_stopped():
            return
        self.folder.mkdir(exist_ok=True)
        sheet = media.contact_sheet(list(media.as_clips(self.pipe.decode(x).cpu().numpy())), self.names)
        sheet.save(self.folder / f"{step:07d}.png")
