"""What of Ray Data's messages reaches a user's terminal, and where its tasks run."""

import io
import logging

import pytest

from wrpo_ray.runtime.cluster import IGNORED_WARNINGS, _prepare_ray_data
from wrpo_ray.runtime.placement import NO_GPU_NODES


@pytest.fixture
def terminal(monkeypatch):
    """What the handlers of Ray Data write."""
    import ray

    assert ray.data  # makes the handlers
    written, logger = io.StringIO(), logging.getLogger("ray.data")
    handler = logging.StreamHandler(written)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logger.level)
    _prepare_ray_data()
    _prepare_ray_data()
    yield written
    assert len(handler.filters) == 1


LOGGERS = ("ray.data", "ray.data.dataset", "ray.data._internal.execution.resource_manager")


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.parametrize("level", ["warning", "error", "critical"])
def test_a_warning_that_nobody_has_named_is_told(name, level, terminal):
    told = "Cluster resources are not enough to run any task from Map. The job may hang forever"
    getattr(logging.getLogger(name), level)("%s", told)
    assert terminal.getvalue() == f"{told}\n"


@pytest.mark.parametrize("name", LOGGERS)
def test_what_is_understood_and_what_is_told_in_passing_is_left_out(name, terminal):
    for beginning in IGNORED_WARNINGS:
        logging.getLogger(name).warning(f"{beginning} and more")
    logging.getLogger(name).info("Starting execution of Dataset")
    assert terminal.getvalue() == ""


def test_ray_data_keeps_off_nodes_with_gpus(terminal):
    import ray

    assert ray.data.DataContext.get_current().execution_options.label_selector == NO_GPU_NODES
