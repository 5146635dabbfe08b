"""Estimates: what is counted is what a step takes, the largest batch is the largest, and flags that are named help."""

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import tiny_autoencoders
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
TINY_STEP = "--model EqM-T/4 --num-classes 10 --global-batch-size"
# EQM_PEAK is to hold the flags of train.py for one step, say of a larger model; -s shows what is counted of it.
PEAKS = [os.environ["EQM_PEAK"]] if "EQM_PEAK" in os.environ else [
    f"{TINY_STEP} 4", f"{TINY_STEP} 8 --grad-accum-steps 2 --use-bf16", f"{TINY_STEP} 4 --ebm dot --use-amp",
]  # fmt: skip


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


@pytest.mark.parametrize("flags", PEAKS)
def test_the_peak_on_a_cpu_is_the_allocators(flags):
    _, args = estimate.parse_args(["--device", "cpu", *flags.split()])
    name, batch = precision.name_of(args), args.global_batch_size // args.grad_accum_steps
    trainer = None

    def step():
        nonlocal trainer  # made within, so that its memory counts
        trainer = trainer or real_trainer(args, name, torch.device("cpu"))
        trainer.step(batches(trainer.model, batch, "cpu"))

    measured = allocated(step)
    with rehearsal.rehearsal(args, name) as run:
        counted = run(batch, args.grad_accum_steps).peak
    print(f"counted {counted / 2**20:.1f} MiB, {counted / measured:.3f} of what the allocator held")
    assert counted == pytest.approx(measured, rel=0.1)


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
        found = run(4)
    assert run.device.type == "cpu"
    assert (found.kernels, found.products, found.block) == (expected.kernels, expected.products, expected.block)
    assert (found.peak, found.moved) == pytest.approx((expected.peak, expected.moved), rel=1e-3)


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


def test_a_block_keeps_in_fp32_what_its_operations_need():
    _, args = estimate.parse_args(TINY)
    with rehearsal.rehearsal(args, "fp32") as run:
        few, many = run(2), run(4)
        kept = (many.block - few.block) / 2 / run.model.pos_embed.numel()
    values = (
        2 * (1 + 1 + 1) + 3 + 1 + 1 + 4 + 4 + 1
    )  # of norms, modulations and products twice; qkv, attention, gates, MLP
    assert kept == pytest.approx(4 * values, rel=0.02)


def test_shards_are_shares_of_what_lasts():
    _, args = estimate.parse_args(TINY)
    with rehearsal.rehearsal(args, "bf16") as run:
        alone = run(8, 2)
        run.shards = 4
        shared = run(8, 2)
    lasting = ("weights", "gradients", "moments", "ema")
    assert all(shared.parts[part] == alone.parts[part] // 4 for part in lasting)
    assert alone.peak / 4 < shared.peak < alone.peak and shared.kernels == alone.kernels


def test_passes_that_are_added_up_are_counted_as_they_run(monkeypatch):
    monkeypatch.setattr(estimate.Search, "largest", lambda *_: 0)
    given, args = estimate.parse_args([*TINY, "--global-batch-size", "8", "--grad-accum-steps", "4"])
    taken, _ = estimate.figures(args, "bf16", given)
    with rehearsal.rehearsal(args, "bf16") as run:
        step = run(2, 4)
    assert taken["kernels"] == step.kernels and taken["peak"] == pytest.approx(step.peak, rel=1e-3)
    assert taken["memory_seconds"] == pytest.approx(step.moved / given.card.bandwidth / 1e9)


def test_flags_that_are_said_to_fit_do():
    words = [*TINY, "--memory", "1.13", "--global-batch-size", "64"]
    given, args = estimate.parse_args(words)
    known = {name: estimate.figures(args, name, given) for name in ("fp32", "bf16")}
    text = estimate.verdict(args, given, known)
    assert text.startswith("It does not fit")
    found = text.split("What fits: ")[1].rstrip(".").split("; ")
    assert any("--recompute elementwise" in flags for flags in found)
    assert found[-1].startswith("--use-bf16 --grad-checkpointing")
    for flags in (found[0], found[-1]):
        _, settled = estimate.parse_args([*words, *flags.split()])
        with rehearsal.rehearsal(settled, precision.name_of(settled)) as run:
            passes = settled.grad_accum_steps
            assert run(64 // passes, min(passes, 2)).peak <= estimate.room(given.memory), flags


def test_a_card_without_bf16_says_so():
    given, args = estimate.parse_args([*TINY, "--card", "t4", "--use-bf16"])
    known = {"bf16": estimate.figures(args, "bf16", given)}
    assert known["bf16"] is None and "T4 has no units for bf16" in estimate.verdict(args, given, known)
    assert estimate.as_text(known).splitlines()[-1].startswith("| bf16 | - | - |")


def test_encoding_is_counted_without_weights_or_data(tiny_vae):
    words = [*TINY, "--image-size", "32", "--vae", tiny_vae, "--sample-every", "1"]
    steps = []
    for source in ("--data-path", "--latents"):
        _, args = estimate.parse_args([*words, source, "nowhere"])
        with rehearsal.rehearsal(args, "fp16") as run:
            steps.append(run(4))
    assert steps[0].parts["autoencoder"] > steps[1].parts["autoencoder"] > 0, "a preview wants its weights alone"
    assert steps[0].kernels > steps[1].kernels and {kind for kind, _ in steps[0].products} > {"convolution"}


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderKL"])  # without a posterior, and with one
def test_chunks_that_are_not_run_again_are_counted_as_if_they_were(tmp_path, monkeypatch, kind):
    tiny_autoencoders.build(kind).save_pretrained(tmp_path)
    _, args = estimate.parse_args([*TINY, "--image-size", "32", "--data-path", "x", "--vae", str(tmp_path)])

    def steps():
        """Of a smaller batch than a chunk of 2, and of 3 chunks and a rest; and how often the autoencoder ran."""
        with rehearsal.rehearsal(args, "fp16") as run:
            run.autoencoder.chunk = 2 * 32 * 32
            run.trainer.step = lambda stream: next(stream)
            encode, passes = run.autoencoder.network.encode, []
            run.autoencoder.network.encode = lambda x: passes.append(len(x)) or encode(x)
            return [run(batch) for batch in (1, 7)], passes

    quick, passes = steps()
    assert passes == [1, 2]
    monkeypatch.setattr(rehearsal, "encode_few", lambda *_: None)
    slow, passes = steps()
    assert passes == [1, 2, 2, 2, 1]
    for one, other in zip(quick, slow, strict=True):
        assert (one.by_name, one.products, one.moved) == (other.by_name, other.products, other.moved)
        assert one.peak == pytest.approx(other.peak, rel=1e-3)
    assert quick[0].kernels < quick[1].kernels


@pytest.mark.parametrize("source", ["--sample-every 5", "--data-path x"])
def test_autoencoders_are_counted_on_a_cpu_too(tiny_vae, source):
    _, args = estimate.parse_args([*TINY, "--image-size", "32", "--vae", tiny_vae, "--device", "cpu", *source.split()])
    with rehearsal.rehearsal(args, "fp16") as run:
        assert run(4).parts["autoencoder"] > 0


def test_a_cpu_has_no_context_to_leave_room_for():
    given, args = estimate.parse_args([*TINY, "--device", "cpu", "--memory", "0.5"])
    assert "CUDA" not in estimate.notes(args, given)[0] and estimate.room(given.memory, given.context) > 0.4 * 2**30
    assert "1 GiB for CUDA's context" in estimate.notes(*reversed(estimate.parse_args(TINY)))[0]


def test_help_says_where_the_other_flags_are(run_script):
    assert "EqM/train.py --help" in run_script("estimate", "--help").out


def test_the_table_has_a_row_for_each_model_and_precision(monkeypatch):
    @contextmanager
    def pretended(args, name):
        size = (40 if name == "fp32" else 20) // (2 if args.grad_checkpointing else 1)
        yield lambda batch, passes: SimpleNamespace(batch=batch, peak=2**20 * size * batch)

    monkeypatch.setattr(estimate, "rehearsal", pretended)
    monkeypatch.setattr(estimate, "TABLE_MODELS", {"tiny": TINY})
    rows = [line.split(" | ") for line in estimate.largest_batches(lambda line: None).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["| tiny", "FP32"], ["| tiny", "BF16"]]
    for row, size in zip(rows, (40, 20), strict=True):
        cells = [tuple(map(int, cell.strip(" |").split(" / "))) for cell in row[2:]]
        rooms = [estimate.room(memory) // 2**20 for memory in estimate.TABLE_MEMORY]
        assert cells == [(room // size, room // (size // 2)) for room in rooms]


@pytest.mark.parametrize(
    "flags",
    [
        "--card h1000",
        "--memory 0",
        "--memory 0.5",
        "--global-batch-size 5 --ranks 2",
        "--device cuda:1",
        "--json nowhere/x",
        "--image-size 20",
        "--shard --ranks 2 --ebm dot",
    ],
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
