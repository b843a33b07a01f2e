from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvtool.errors import CapacityError, ConfigError, DataError
from kvtool.files import append_records, open_run, read_records, read_run, write_atomic, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail(file: object) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [{"a": 1}, {"a": 2}])
    with path.open("ab") as file:
        file.write(b'{"a": 3')
    assert read_records(path) == [{"a": 1}, {"a": 2}]
    append_records(path, [{"a": 4}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_records(path)


def test_run_folder_is_bound_to_its_configuration(tmp_path: Path) -> None:
    assert open_run(tmp_path, {"n": 3, "task": "niah"}, {}) is False
    (tmp_path / ".ranking.jsonl.abc.tmp").write_text("half")
    assert open_run(tmp_path, {"n": 3, "task": "niah"}, {}) is True
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(ConfigError, match=r"n: 3 there, 4 now"):
        open_run(tmp_path, {"n": 4, "task": "niah"}, {})
    assert read_run(tmp_path)["config"] == {"n": 3, "task": "niah"}


def test_missing_and_damaged_runs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_run(tmp_path)


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def test_full_disk_is_one_line_and_earlier_output_survives(tmp_path: Path) -> None:
    """The kernel's file size limit makes a real write fail half-way, as a full disk does."""
    path = tmp_path / "records.jsonl"
    code = (
        "import sys; from pathlib import Path; from kvtool.files import append_records, write_text\n"
        "path = Path(sys.argv[1]); append_records(path, [{'a': 1}])\n"
        "try: append_records(path, [{'a': 'x' * 5000}])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "write_text(path.with_name('old.txt'), 'old')\n"
        "try: write_text(path.with_name('old.txt'), 'y' * 5000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], preexec_fn=limit_file_size, capture_output=True, text=True, check=True
    )
    assert run.stdout.count(CapacityError.__name__) == 2
    assert "no space left" in run.stdout
    assert read_records(path) == [{"a": 1}]
    assert (tmp_path / "old.txt").read_text() == "old"
