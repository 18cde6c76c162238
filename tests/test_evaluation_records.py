"""Records of an evaluation that wait for what threads still measure."""

from concurrent.futures import Future

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
        for index in range(40):
            done = Future()
            done.set_result(index)
            records.append_later("a", {"index": index, "value": done})
        assert 20 <= len(records.read("a")) < 40

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
