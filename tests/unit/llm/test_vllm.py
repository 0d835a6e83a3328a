"""What an engine's own process tells of its end."""

import gc
from contextlib import suppress

import pytest

from wrpo_ray.llm import vllm_settings as vllm
from wrpo_ray.runtime.worker_errors import capture_error

RAISED = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"
PRINTED = """:actor_name:generate qwen
(EngineCore pid=3346) Process EngineCore:
(EngineCore pid=3346) Traceback (most recent call last):
(EngineCore pid=3346)   File "/x/vllm/v1/engine/core.py", line 134, in __init__
(EngineCore pid=3346)     self.model_executor = executor_class(vllm_config)
(EngineCore pid=3346) ModuleNotFoundError: No module named 'flashinfer'
"""
LOGGED = """(EngineCore_DP0 pid=7) ERROR 11-26 18:36:01 [core.py:9] EngineCore failed to start.
(EngineCore_DP0 pid=7) ERROR 11-26 18:36:01 [core.py:9] Traceback (most recent call last):
(EngineCore_DP0 pid=7) ERROR 11-26 18:36:01 [core.py:9] torch.OutOfMemoryError: CUDA out of memory.
"""


OF_A_PART = """(Worker pid=9) ERROR 11-26 18:47:50 [executor.py:9] ValueError: no such layer
(EngineCore pid=7) ERROR 11-26 18:47:52 [core.py:9] Exception: WorkerProc failed. See root cause.
"""


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    files = tmp_path / "worker.out", tmp_path / "worker.err"
    monkeypatch.setattr(vllm, "OUTPUTS", files)
    return files


@pytest.mark.parametrize(
    ("logged", "printed", "cause"),
    [
        ("", PRINTED, "ModuleNotFoundError: No module named 'flashinfer'"),
        ("", "x" * 10**6 + "\n" + PRINTED, "ModuleNotFoundError: No module named 'flashinfer'"),
        (LOGGED, "", "torch.OutOfMemoryError: CUDA out of memory."),
        (OF_A_PART, OF_A_PART.splitlines()[-1], "ValueError: no such layer"),
    ],
)
def test_the_root_cause_is_told_in_place_of_that_there_is_one(outputs, logged, printed, cause):
    for file, text in zip(outputs, (logged, printed), strict=True):
        file.write_text(text)

    def fail(row):
        raise RuntimeError(RAISED)

    result = capture_error("generate qwen", fail, {})
    assert result["message"].startswith(f"generate qwen failed: EngineProcessError: {cause}; fix")
    assert RAISED in result["trace"]


def test_what_tells_itself_stays(outputs):
    error = ValueError("no room")
    outputs[1].write_text(PRINTED)
    assert vllm.with_root_cause(error) is error


@pytest.mark.parametrize("text", ["", "ValueError: of another process\n"])
def test_without_a_word_of_it_the_error_stays(outputs, text):
    outputs[1].write_text(text)  # the other is not there, like a closed one
    error = RuntimeError(RAISED)
    assert vllm.with_root_cause(error) is error


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("error", [None, ImportError])
def test_imports_leave_the_garbage_collection_as_it_was(is_on, error):
    (gc.enable if is_on else gc.disable)()
    try:
        with suppress(ImportError), vllm.quick_imports():
            assert not gc.isenabled()
            if error:
                raise error
        assert gc.isenabled() == is_on
    finally:
        gc.enable()
