"""What is told in one line and what keeps its traceback; names that a terminal's encoding lacks."""

import errno
import io
import os
import sys
from argparse import Namespace

import pytest
import torch

from EqM import cli
from EqM.run import errors


@pytest.mark.parametrize(
    ("error", "mendable"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied", "file"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "file"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError(errno.EINVAL, "Invalid argument"), False),
        (OSError(errno.EBADF, "Bad file descriptor"), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), False),
        (OSError("a library's own words"), False),
    ],
)
def test_an_os_error_is_one_line_where_a_user_can_mend_it(capfd, error, mendable):
    def main():
        raise error

    with pytest.raises(SystemExit if mendable else OSError) as stop:
        cli.run(main)
    err = capfd.readouterr().err
    assert err.count("\n") == (1 if mendable else 0) and (not mendable or stop.value.code == 2)


def too_much():
    torch.empty(2**60)


def in_a_library():
    try:
        too_much()
    except RuntimeError as error:
        raise ValueError("compiled code failed") from error


def wrapped(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main",
    [
        too_much,
        in_a_library,
        wrapped(MemoryError()),
        wrapped(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")),
        wrapped(RuntimeError("CUDA error: out of memory\nCompile with")),
    ],
)
def test_memory_that_runs_out_is_one_line(capfd, main):
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and ": error: out of memory (" in err


def test_another_runtime_error_keeps_its_traceback():
    assert not errors.is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not errors.is_out_of_memory(KeyError("out of memory"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (None, "a smaller batch or model"),
        (
            {
                "global_batch_size": 256, "grad_accum_steps": 2, "grad_checkpointing": False, "ebm": "none",
                "use_bf16": False, "use_amp": False,
            },
            "a smaller --global-batch-size than 256, more --grad-accum-steps than 2, --grad-checkpointing, --use-bf16",
        ),
        (
            {"recompute": None, "grad_checkpointing": False, "ebm": "none", "use_bf16": False, "use_amp": True},
            "--grad-checkpointing",
        ),
        (
            {"recompute": "nothing", "grad_checkpointing": False, "ebm": "none", "use_bf16": True},
            "--recompute elementwise, --grad-checkpointing",
        ),
        (
            {"recompute": None, "grad_checkpointing": False, "ebm": "none", "use_bf16": False, "use_amp": False},
            "--recompute elementwise, --grad-checkpointing, --use-bf16",
        ),
        ({"global_batch_size": 64, "use_bf16": True, "use_amp": False}, "a smaller --global-batch-size than 64"),
        ({"batch_size": 32, "use_bf16": False, "use_amp": True}, "a smaller --batch-size than 32"),
        ({"global_batch_size": 1, "grad_accum_steps": 1, "use_bf16": True}, "a smaller batch or model"),
    ],
)  # fmt: skip
def test_what_needs_less_memory_names_flags_that_are_left_to_take(args, words):
    assert cli.less_memory(args and Namespace(**args)) == f"what needs less: {words}"


def test_several_ranks_may_share_what_one_cannot_hold(monkeypatch):
    args = Namespace(global_batch_size=1, shard=False, ebm="none")
    assert "--shard" not in cli.less_memory(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.less_memory(args) == "what needs less: --shard"
    assert "--shard" not in cli.less_memory(Namespace(**{**vars(args), "ebm": "dot"}))


def test_memory_that_runs_out_in_a_command_names_its_own_batch(run_script, monkeypatch, tmp_path):
    def setup(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("EqM.run.distributed.setup", setup)
    result = run_script("train", "--data-path", tmp_path, "--global-batch-size", 48)
    assert (
        result.code == 2
        and "--global-batch-size than 48, more --grad-accum-steps than 1, --recompute elementwise, --g" in result.err
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (b"caf\xe9.png", r"caf\udce9.png"),
        ("\N{LATIN SMALL LETTER U WITH DIAERESIS}.png".encode(), "\N{LATIN SMALL LETTER U WITH DIAERESIS}.png"),
        (b"two\nlines\x1b[2J", r"two\nlines\x1b[2J"),
    ],
)
def test_a_name_is_one_line_that_utf8_takes(name, told):
    assert errors.printable(os.fsdecode(name)) == told
    told.encode()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_whatever_the_encoding_a_line_is_printed(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    errors.print_anything()
    print("\N{CJK UNIFIED IDEOGRAPH-6771} \udcff", flush=True)
    assert b"\\udcff" in stream.buffer.getvalue()
