"""Traces are data: read exactly, or refused in one line."""

from __future__ import annotations

import csv
import gzip
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import trace_file
from harness.sizes import BadValue
from harness.trace_file import SAMPLE, read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(folder, text, name="trace"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path, **options):
    with pytest.raises(BadValue) as caught:
        read_trace(path, **options)
    message = str(caught.value)
    assert message.startswith("workload.path=") and "\n" not in message and len(message) < 400
    return message


def test_the_sample_is_read_whole():
    with gzip.open(SAMPLE, "rt") as source:
        rows = list(csv.DictReader(source))
    trace = read_trace()
    assert len(trace.requests) == len(rows) == 10_000
    assert trace.input_tokens == sum(int(r["ContextTokens"]) for r in rows)
    assert trace.output_tokens == sum(int(r["GeneratedTokens"]) for r in rows)
    arrivals = [r.arrival_seconds for r in trace.requests]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    assert trace.requests[1].arrival_seconds == pytest.approx(4.314579, abs=1e-6)
    assert SAMPLE.stat().st_size < 300 << 10
    assert "CC-BY-4.0" in (SAMPLE.parent / "README.md").read_text()


def test_azures_csv(tmp_path):
    text = AZURE + "2023-11-16 18:17:04.0000000,7,0\r\n\n2023-11-16 18:17:03.5,3,2\n"
    trace = read_trace(written(tmp_path, text))
    assert [r[1:] for r in trace.requests] == [(3, 2), (7, 0)]
    assert [r.arrival_seconds for r in trace.requests] == pytest.approx([0, 0.5])
    assert (trace.longest_tokens, trace.prefix_hashes) == (7, 0)


def test_further_columns_seconds_and_time_zones(tmp_path):
    text = "id,GeneratedTokens,ContextTokens,TIMESTAMP\nx,2,3,0.25\ny,4,5,1.25\n"
    trace = read_trace(written(tmp_path, text))
    assert trace.requests[1] == (1.0, 5, 4)
    text = AZURE + "2024-05-10 00:00:01+00:00,1,1\n2024-05-10T00:00:00Z,1,2\n"
    assert read_trace(written(tmp_path, text, "zones")).requests[1] == (1.0, 1, 1)


def test_mooncakes_json_lines(tmp_path):
    lines = [
        {"timestamp": 1500, "input_length": 1000, "output_length": 5, "hash_ids": [1, 2, 2]},
        {"timestamp": 1000, "input_length": 600, "output_length": 1, "hash_ids": [1, 3]},
        {"timestamp": 3000.5, "input_length": 1, "output_length": 1},
    ]
    data = gzip.compress("\n".join(map(json.dumps, lines)).encode())
    trace = read_trace(written(tmp_path, data))
    assert [r[1:] for r in trace.requests] == [(600, 1), (1000, 5), (1, 1)]
    assert trace.requests[1].arrival_seconds == pytest.approx(0.5)
    assert (trace.prefix_hashes, trace.prefix_hashes_repeated) == (5, 2)


def test_the_first_requests_only_and_a_digest_of_what_was_read(tmp_path):
    lines = [f"{i},{i + 1},1" for i in range(10)]
    path = written(tmp_path, AZURE + "\n".join(lines))
    whole = read_trace(path)
    assert len(read_trace(path, limit=3).requests) == 3
    path.write_text(AZURE + "\n".join(lines).replace("9,10,1", "9,11,1"))
    assert read_trace(path).digest != whole.digest
    assert read_trace(path).input_tokens == whole.input_tokens + 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("hello\nworld\n", "no such columns"),
        (AZURE, "no request"),
        (AZURE + "2023-11-16 18:17:03,1\n", "line 2: 2 fields"),
        (AZURE + "yesterday,1,1\n", "line 2: TIMESTAMP"),
        (AZURE + "1.0,-1,1\n", "line 2"),
        (AZURE + "1.0,1e3,1\n", "line 2"),
        (AZURE + "1.0,0,0\n", "line 2"),
        (AZURE + "1.0,99999999999999999999,1\n", "line 2"),
        (AZURE + '1.0,"' + "1" * 200_000 + '",1\n', "line 2"),
        (AZURE + "2023-99-99 00:00:00,1,1\n", "line 2"),
        ('{"timestamp": 1, "input_length": 2}\n', "output_length is missing"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3', "cut off"),
        ('{"timestamp": NaN, "input_length": 2, "output_length": 3}', "NaN"),
        ('{"timestamp": 1, "input_length": true, "output_length": 3}', "input_length"),
        ('{"timestamp": 1, "input_length": 2.5, "output_length": 3}', "whole"),
        ('{"timestamp": 1, "input_length": 1' + "0" * 400 + ', "output_length": 3}', "line 1"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": "x"}', "hash_ids"),
        ('{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [[]]}', "hash_ids"),
        ('{"x": ' + "[" * 100_000, "line 1"),
        ("[1, 2]\n", "no such columns"),
        (b"\x7fELF\x00\x01\x02" * 40, "line 1"),
        (b"\xff\xfe\x00" * 40, "not UTF-8"),
        (b"\x1f\x8b not gzip at all", "damaged gzip"),
        (gzip.compress((AZURE + "1.0,1,1\n").encode())[:-9], "damaged gzip"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, text, said):
    assert said in refusal(written(tmp_path, text))


def test_no_file_a_folder_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    assert "no such file" in refusal(tmp_path / "absent")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")
    assert "not a regular file" in refusal("/dev/zero")
    assert refusal("a\0b")


def test_limits(tmp_path, monkeypatch):
    long = written(tmp_path, AZURE + "1.0," + "1" * (trace_file.MAX_LINE_BYTES + 1))
    assert "more than 1 MiB" in refusal(long)
    monkeypatch.setattr(trace_file, "MAX_REQUESTS", 3)
    assert "more than 3 requests" in refusal(written(tmp_path, AZURE + "1.0,1,1\n" * 4, "many"))
    monkeypatch.setattr(trace_file, "MAX_LINES", 10)
    assert "lines" in refusal(written(tmp_path, AZURE + "\n" * 20, "blank"))
    monkeypatch.setattr(trace_file, "MAX_TEXT_BYTES", 1 << 20)
    bomb = gzip.compress(AZURE.encode() + (b"1.0,1,1" + b" " * 500_000 + b"\n") * 3)
    assert len(bomb) < 10_000
    assert "MiB" in refusal(written(tmp_path, bomb, "bomb"))


@given(data=st.binary(max_size=300), prefix=st.sampled_from(["", AZURE, "{", "\x1f\x8b"]))
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_a_trace_or_one_line(tmp_path_factory, data, prefix):
    path = written(tmp_path_factory.getbasetemp(), prefix.encode("latin-1") + data, "fuzz")
    try:
        trace = read_trace(path)
    except BadValue as error:
        assert "\n" not in str(error)
    else:
        assert all(r.total_tokens >= 1 for r in trace.requests)
