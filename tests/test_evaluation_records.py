"""Records of an evaluation that wait for what threads still measure."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from metaaux.evaluation.records import Records
from metaaux.evaluation.threads import face_threads


class TestDeferredRecords:
    """What threads still measure is written in its turn."""

    def test_are_written_in_order_with_the_results(self, tmp_path):
        records = Records(tmp_path, {"methods": {"a": {}}})
        first, second = Future(), Future()
        records.append_later("a", {"index": 0, "values": {"smile": [first, 1.0]}})
        records.append_later("a", {"index": 1, "values": {"smile": [second, 2.0]}})
        second.set_result(0.5)
        assert records.read("a") == {}
        first.set_result(None)
        records.settle()
        assert [record["values"]["smile"] for record in records.read("a").values()] == [[None, 1.0], [0.5, 2.0]]

    def test_no_more_than_a_few_wait(self, tmp_path):
        records = Records(tmp_path, {"methods": {"a": {}}})
        pending = [Future() for _ in range(40)]
        with ThreadPoolExecutor(1) as threads:
            # One after the other, from the second on only when the one before has been written.
            def measure():
                for index, future in enumerate(pending[:24]):
                    while len(records.read("a")) < index:
                        time.sleep(0.001)
                    future.set_result(index)

            threads.submit(measure)
            for index, future in enumerate(pending):
                records.append_later("a", {"index": index, "value": future})
            assert 20 <= len(records.read("a")) < 40

    def test_what_waits_for_nothing_is_written_at_once(self, tmp_path):
        records = Records(tmp_path, {"methods": {"a": {}}})
        for index in range(3):
            records.append_later("a", {"index": index, "value": [1.0, {"b": None}]})
            assert len(records.read("a")) == index + 1

    def test_an_interruption_writes_what_was_measured(self, tmp_path):
        records = Records(tmp_path, {"methods": {"a": {}}})
        with pytest.raises(KeyboardInterrupt), records.measuring(torch.device("cpu")) as threads:
            records.append_later("a", {"index": 0, "value": threads.submit(time.sleep, 0.05)})
            raise KeyboardInterrupt
        assert records.read("a") == {0: {"index": 0, "value": None}}

    def test_a_failure_is_told_and_keeps_the_others(self, tmp_path):
        records = Records(tmp_path, {"methods": {"a": {}}})
        broken, fine = Future(), Future()
        records.append_later("a", {"index": 0, "value": broken})
        records.append_later("a", {"index": 1, "value": fine})
        broken.set_exception(RuntimeError("graph failed"))
        fine.set_result(3)
        with pytest.raises(RuntimeError, match="graph failed"):
            records.settle()
        records.settle()
        assert records.read("a") == {1: {"index": 1, "value": 3}}

    @pytest.mark.parametrize(
        ("device", "cores", "processes", "threads"),
        [("cpu", 64, 1, 1), ("cuda", 64, 1, 8), ("cuda", 16, 4, 4), ("cuda", 2, 4, 1)],
    )
    def test_threads_are_a_process_share_of_the_cores(self, monkeypatch, device, cores, processes, threads):
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        with face_threads(torch.device(device)) as pool:
            assert pool._max_workers == threads
