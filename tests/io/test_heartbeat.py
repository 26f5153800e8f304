"""A worker that hangs is found by its silence; a slow one is not taken for hung."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rightrank.io.heartbeat import BEAT_SECONDS, PATIENCE, Heartbeat, HeartbeatWatch


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_silence_is_measured_from_the_last_change_and_patience_grows_with_the_longest_silence(tmp_path: Path) -> None:
    worker, driver = Clock(), Clock()
    beat = Heartbeat(tmp_path / "beat", worker)
    watch = HeartbeatWatch(tmp_path / "beat", least_seconds=30, clock=driver)
    for gap in (2.0, 5.0, 2.0):
        worker.now += gap
        driver.now += gap
        beat.beat(f"step at {worker.now}")
        assert watch.silent_seconds() == 0
    assert watch.limit_seconds == PATIENCE * 5.0
    driver.now += PATIENCE * 5.0
    assert not watch.is_hung()
    driver.now += 1
    assert watch.is_hung()
    assert watch.last_words() == "step at 109.0"


def test_a_worker_with_its_clock_set_back_is_not_taken_for_hung(tmp_path: Path) -> None:
    worker, driver = Clock(), Clock()
    beat = Heartbeat(tmp_path / "beat", worker)
    beat.beat("first")
    os.utime(tmp_path / "beat", (0, 0))  # the file says 1970
    watch = HeartbeatWatch(tmp_path / "beat", least_seconds=10, clock=driver)
    driver.now += 9
    worker.now += BEAT_SECONDS
    beat.beat("second")
    os.utime(tmp_path / "beat", (0, 0))
    assert watch.silent_seconds() == 0


def test_beats_are_written_once_a_second_at_most_and_a_lost_folder_stops_no_work(tmp_path: Path) -> None:
    worker = Clock()
    beat = Heartbeat(tmp_path / "beat", worker)
    beat.beat("one")
    beat.beat("two")
    assert (tmp_path / "beat").read_text().endswith("one\n")
    worker.now += BEAT_SECONDS
    beat.beat("three")
    assert (tmp_path / "beat").read_text().endswith("three\n")
    (tmp_path / "file").write_text("")
    Heartbeat(tmp_path / "file" / "beat", worker).beat("no folder")


WORKER = """
import sys, time
from pathlib import Path
from rightrank.io.heartbeat import Heartbeat
beat = Heartbeat(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    beat.beat(f"step {step}")
    time.sleep(0.05)
"""


def test_a_stopped_process_is_found_and_a_working_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(path)])
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        watch = HeartbeatWatch(path, least_seconds=0)
        deadline = time.monotonic() + 1.5 * BEAT_SECONDS
        while time.monotonic() < deadline:
            assert watch.silent_seconds() < 10 * BEAT_SECONDS
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)  # hung: alive, and doing nothing
        stopped = HeartbeatWatch(path, least_seconds=2 * BEAT_SECONDS)
        while not stopped.is_hung():
            time.sleep(0.05)
        assert process.poll() is None
        assert stopped.last_words().startswith("step ")
    finally:
        process.kill()
        process.wait()
