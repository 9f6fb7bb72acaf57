import json
import os
import socket
import threading

import pytest

from memloc_lens.runs.folder import RunFolder, resuming


def elsewhere(work) -> list[BaseException]:
    """What goes wrong in another thread, which locks as another process does."""
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_others_are_told_who_uses_the_folder(tmp_path):
    own = f"process {os.getpid()} on {socket.gethostname()}"
    with RunFolder(tmp_path, {}) as folder:
        for attempt in (lambda: RunFolder(tmp_path, {}), lambda: resuming(tmp_path).__enter__()):
            (error,) = elsewhere(attempt)
            assert isinstance(error, ValueError)
            assert f"{tmp_path} is in use by {own}; wait for it to end" in str(error)
        (tmp_path / "lock.json").write_text("[]")
        (error,) = elsewhere(lambda: RunFolder(tmp_path, {}))
        assert "is in use by another process" in str(error)
        assert RunFolder(tmp_path, {}).records == folder.records == []  # the same thread may look
    del folder


def test_a_folder_is_free_after_a_run_however_it_ended(tmp_path):
    with pytest.raises(KeyboardInterrupt), resuming(tmp_path), RunFolder(tmp_path, {}):
        raise KeyboardInterrupt
    assert elsewhere(lambda: RunFolder(tmp_path, {}).close()) == []
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        RunFolder(tmp_path, {})
    (tmp_path / "config.json").unlink()
    assert elsewhere(lambda: RunFolder(tmp_path, {}).close()) == []


def test_a_lock_that_a_dead_process_left_is_free(tmp_path):
    (tmp_path / "run.lock").write_text("")
    (tmp_path / "lock.json").write_text(json.dumps({"host": "gone", "process": 1}))
    with RunFolder(tmp_path, {}):
        assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
