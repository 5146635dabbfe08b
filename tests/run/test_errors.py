"""What is printed of names that a terminal's encoding lacks."""

import io
import os
import sys

import pytest

from EqM.run import errors


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
