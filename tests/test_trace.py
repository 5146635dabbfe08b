"""What a trace keeps of a descent, against the descent itself."""

import torch

from EqM import EqMPipeline, trace
from helpers import IMAGE_ARGS, save_checkpoint


def test_a_trace_holds_the_path_and_the_norms_of_each_sample(tmp_path):
    ckpt = save_checkpoint(tmp_path / "x.pt", {**IMAGE_ARGS, "ebm": "dot"})
    pipe = EqMPipeline.from_pretrained(ckpt, device="cpu")
    how = {"num_sampling_steps": 5, "stepsize": 0.1, "cfg_scale": 1.0}
    seen = trace.follow(pipe, [0, 2], [3, 8], seed=1, **how)
    ends = {
        i: x for part in pipe.draw([0, 2], [3, 8], seed=1, **how) for i, x in zip(part.indices, part.x, strict=True)
    }
    for row, (index, label) in enumerate([(3, 0), (8, 2)]):
        states = seen.states[row]
        assert [state.step for state in states] == [0, 1, 2, 3, 4]
        assert torch.equal(states[0].x, pipe.noise([index], 1)[0]) and torch.equal(states[-1].x, ends[index])
        for (step, norm, energy), state in zip(seen.curves[row], states[:-1], strict=True):
            assert step == state.step
            torch.testing.assert_close(norm, pipe.field(state.x[None], [label]).norm())
            torch.testing.assert_close(energy, pipe.energy(state.x[None], [label])[0])


def test_long_descents_keep_a_bounded_number_of_states(tmp_path):
    pipe = EqMPipeline.from_pretrained(save_checkpoint(tmp_path / "x.pt", IMAGE_ARGS), device="cpu")
    seen = trace.follow(pipe, [0], [0], num_sampling_steps=131, stepsize=0.01, cfg_scale=1.0)
    assert len(seen.curves[0]) == 130 and 60 <= len(seen.states[0]) <= 67
    assert seen.states[0][-1].step == 130
