"""Estimates: what is counted is what a step takes, the largest batch is the largest, and flags that are named help."""

import json
from types import SimpleNamespace

import pytest
import torch

from EqM import architecture
from EqM.data.autoencoder import draw
from EqM.engine import precision
from EqM.engine.trainer import Trainer
from EqM.measure import estimate, rehearsal
from EqM.measure.counting import CHUNK, Count, launches
from EqM.models import EqM_models

TINY = ["--model", "EqM-T/4", "--num-classes", "10"]
KEYS = (
    "weights gradients moments ema activations autoencoder peak bytes_per_token_channel largest_batch "
    "product_seconds memory_seconds kernels"
)


def batches(model, batch, device):
    while True:
        moments = torch.zeros(batch, 2, *model.input_shape, dtype=torch.float16, device=device)
        yield draw(moments), torch.zeros(batch, dtype=torch.long, device=device)


def real_trainer(args, name, device):
    model = architecture.build_model(args).to(device)
    return Trainer(args, model, precision.activate(name, device), 10)


def allocated(work):
    """The most memory that PyTorch's CPU allocator held within the second call of work, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
        with torch.profiler.record_function("second"):
            work()
    events, stack = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        events.append(stack.pop())
        stack += events[-1].children
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.name == "second":
            peak = held
        if event.tag == torch._C._profiler._EventType.Allocation:
            held += event.extra_fields.alloc_size
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("name", "flags"), [("fp32", ""), ("bf16", "--grad-accum-steps 2"), ("fp16", "--ebm dot")])
def test_the_peak_on_a_cpu_is_the_allocators(name, flags):
    _, args = estimate.parse_args([*TINY, "--device", "cpu", *flags.split()])
    trainer = None

    def step():
        nonlocal trainer  # made within, so that its memory counts
        trainer = trainer or real_trainer(args, name, torch.device("cpu"))
        trainer.step(batches(trainer.model, 4, "cpu"))

    measured = allocated(step)
    with rehearsal.rehearsal(args, name) as run:
        assert run(4, args.grad_accum_steps).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", precision.FLAGS)
@pytest.mark.parametrize("flags", ["", "--grad-checkpointing"])
def test_the_peak_on_a_gpu_is_the_allocators(name, flags):
    _, args = estimate.parse_args(["--model", "EqM-S/2", *flags.split()])
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    trainer = real_trainer(args, name, device)
    trainer.step(batches(trainer.model, 16, device))
    torch.cuda.reset_peak_memory_stats(device)
    trainer.step(batches(trainer.model, 16, device))
    measured = torch.cuda.max_memory_allocated(device) - before
    capability = torch.cuda.get_device_capability(device)
    del trainer
    with rehearsal.rehearsal(args, name, capability) as run:
        assert run(16).peak == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a PyTorch without CUDA has nothing to compare with")
def test_a_pytorch_without_cuda_counts_the_same(monkeypatch):
    _, args = estimate.parse_args([*TINY, "--max-grad-norm", "1", "--lr-schedule", "cosine"])
    with rehearsal.rehearsal(args, "bf16") as run:
        expected = run(4)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with rehearsal.rehearsal(args, "bf16") as run:
        assert run.device.type == "cpu" and run(4) == expected


@pytest.mark.parametrize("most", [0, 5, 99, 100, 101, 217, 1000, 12345])
@pytest.mark.parametrize("start", [1, 8, 256])
def test_the_largest_batch_of_a_convex_peak_is_found_in_few_steps(most, start):
    def peak(batch):
        return max(100, 40 + 3 * batch, 7 * batch)

    def run(batch, passes):
        return SimpleNamespace(batch=batch, peak=peak(batch), parts={"activations": 6 * batch})

    search = estimate.Search(run)
    search.step(start), search.step(start // 2 or 2)
    assert search.largest(most) == max((batch for batch in range(5000) if peak(batch) <= most), default=0)
    assert len(search.steps) <= 12


def test_figures_are_those_of_the_issue_and_agree_with_each_other(run_script, tmp_path):
    file = tmp_path / "estimate.json"
    result = run_script(
        "estimate", *TINY, "--global-batch-size", 16, "--ranks", 2, "--memory", 2, "--card", "a100", "--json", file
    )
    assert result.code == 0, result.err
    known = json.loads(file.read_text())
    parameters = sum(p.numel() for p in EqM_models["EqM-T/4"](input_size=32, num_classes=10).parameters())
    assert list(known) == ["fp32", "bf16", "fp16"]
    for name, taken in known.items():
        assert " ".join(taken) == KEYS
        assert taken["weights"] == taken["ema"] == pytest.approx(4 * parameters, rel=0.02)
        assert taken["moments"] == pytest.approx(2 * taken["gradients"], rel=0.02) and taken["autoencoder"] == 0
        lasting = taken["weights"] + taken["moments"] + taken["ema"]
        assert lasting < taken["peak"] <= lasting + taken["gradients"] + taken["activations"]
        assert taken["largest_batch"] > 8 and f"| {name} |" in result.out
    assert known["bf16"]["product_seconds"] < known["fp32"]["product_seconds"]
    assert known["bf16"]["kernels"] > 100 and known["bf16"]["memory_seconds"] > 0
    assert "8 a pass" in result.out and "It fits" in result.out


def test_a_block_keeps_in_fp32_what_its_operations_need_twice():
    """Of a token's channels: three of the norms, modulations and sums each way, qkv, attention, projection, MLP."""
    given, args = estimate.parse_args([*TINY, "--memory", "2", "--global-batch-size", "8"])
    taken, _ = estimate.figures(args, "fp32", given)
    values = 2 * (1 + 1 + 1) + 3 + 1 + 1 + 4 + 4 + 1  # inputs of norms, of modulations, of products; gates' inputs
    assert taken["bytes_per_token_channel"] == pytest.approx(4 * values, rel=0.02)


def test_passes_that_are_added_up_are_counted_as_they_run():
    given, args = estimate.parse_args([*TINY, "--global-batch-size", "10", "--grad-accum-steps", "5"])
    taken, _ = estimate.figures(args, "bf16", given)
    with rehearsal.rehearsal(args, "bf16") as run:
        step = run(2, 5)
    assert (taken["kernels"], taken["peak"]) == (step.kernels, step.peak)
    assert taken["memory_seconds"] == pytest.approx(step.moved / given.card.bandwidth / 1e9)


def test_flags_that_are_said_to_fit_do():
    words = ["--memory", "1.4", *TINY[2:], "--model", "EqM-T/2", "--global-batch-size", "64"]
    given, args = estimate.parse_args(words)
    known = {name: estimate.figures(args, name, given) for name in precision.FLAGS}
    text = estimate.verdict(args, given, known)
    assert text.startswith("It does not fit")
    found = text.split("What fits: ")[1].rstrip(".").split("; ")
    assert found[-1].startswith("--use-bf16 --grad-checkpointing")
    for flags in found[:1] + found[-1:]:
        again, settled = estimate.parse_args([*words, *flags.split()])
        taken, _ = estimate.figures(settled, precision.name_of(settled), again)
        assert taken["peak"] <= estimate.room(given.memory), flags


def test_a_card_without_bf16_says_so(run_script, tmp_path):
    file = tmp_path / "estimate.json"
    words = [*TINY, "--global-batch-size", 4, "--card", "t4", "--memory", 2, "--use-bf16", "--json", file]
    result = run_script("estimate", *words)
    assert result.code == 0 and "T4 has no units for bf16" in result.out
    known = json.loads(file.read_text())
    assert known["bf16"] is None and known["fp16"]["product_seconds"] < known["fp32"]["product_seconds"]


def test_encoding_is_counted_without_weights_or_data(tiny_vae):
    words = [*TINY, "--image-size", "32", "--vae", tiny_vae, "--global-batch-size", "4", "--sample-every", "1"]
    taken = []
    for more in (["--data-path", "nowhere"], ["--latents", "nowhere"]):
        given, args = estimate.parse_args([*words, *more])
        taken.append(estimate.figures(args, "fp16", given)[0])
    assert taken[0]["autoencoder"] > taken[1]["autoencoder"] > 0, "a preview wants its weights alone"
    assert taken[0]["kernels"] > taken[1]["kernels"]


def test_the_table_has_a_row_for_each_model_and_precision(monkeypatch):
    monkeypatch.setattr(estimate, "TABLE_MODELS", {"tiny": TINY})
    monkeypatch.setattr(estimate, "TABLE_MEMORY", (1.5, 3))
    rows = [line.split(" | ") for line in estimate.largest_batches(lambda line: None).splitlines()[2:]]
    assert [row[1] for row in rows] == ["FP32", "BF16"]
    for row in rows:
        pairs = [[int(number) for number in cell.strip(" |").split(" / ")] for cell in row[2:]]
        assert pairs[0][0] < pairs[1][0] and all(0 < plain < less for plain, less in pairs)


@pytest.mark.parametrize(
    "flags", ["--card h1000", "--memory 0", "--global-batch-size 5 --ranks 2", "--device cuda:1", "--image-size 20"]
)
def test_bad_arguments_are_one_line(run_script, flags):
    result = run_script("estimate", *flags.split())
    assert result.code == 2 and result.err.count("\n") == 1


def test_multi_tensor_kernels_take_so_many_launches():
    small, large = [torch.zeros(2, device="meta")] * 100, [torch.zeros(320 * CHUNK + 1, device="meta")]
    assert launches("_foreach_add_", (small, small)) == 2 and launches("_foreach_mul_", (small, 2.0)) == 1
    assert launches("_foreach_mul_", (large, 2.0)) == 2
    assert launches("_foreach_lerp_", (small, small, [torch.zeros((), device="meta")] * 100)) == 100


def test_bytes_of_an_operation_are_its_operands_once():
    a, b = torch.zeros(8, 100), torch.zeros(100)
    for work, expected in [
        (lambda: a + b, 2 * 800 + 100),
        (lambda: a.add_(b), 2 * 800 + 100),
        (lambda: a.zero_(), 800),
        (lambda: a * b.expand(8, 100), 2 * 800 + 100),
        (lambda: a.t(), 0),
        (lambda: a @ b.view(100, 1), 0),
    ]:
        with Count("cpu") as count:
            work()
        assert count.moved == 4 * expected
