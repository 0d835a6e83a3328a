"""Weights that vLLM's streamer reads: what it gets for a store, what is copied, what is refused.

`tests/e2e/test_object_store.py` has an engine that streams.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_models import one_source, write_model

from wrpo_ray.config import EvaluateConfig, ModelConfig, TargetConfig, serving
from wrpo_ray.errors import UserError
from wrpo_ray.llm import weight_stream
from wrpo_ray.llm.weight_stream import (
    PASSED_ON,
    check_loader,
    check_streamed,
    stream_arguments,
    stream_env,
    streams,
)
from wrpo_ray.pipeline.chain import Chain
from wrpo_ray.pipeline.preflight import preflight
from wrpo_ray.storage.folder import Folder, WithoutWeights

HERE = "endpoint_override=127.0.0.1:9000&scheme=http"
WEIGHTS, OTHERS = "model.safetensors", "consolidated.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def stored(folder, bucket) -> str:
    """The address of the same model in a store."""
    address = bucket.replace("/run?", "/models/tiny?")
    Folder(address).upload(folder)
    return address


@pytest.fixture
def installed(monkeypatch) -> None:
    """Its package counts as installed, as these tests load nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(name=name))


def streamed(model: str | Path, **more) -> ModelConfig:
    return ModelConfig(name="a", model=str(model), stream_weights=True, **more)


# --- the store as the streamer knows it ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "endpoint"),
    [
        (f"?{HERE}", "http://127.0.0.1:9000"),
        ("?endpoint_override=store.example", "https://store.example"),
        ("?endpoint_override=http%3A%2F%2Fstore:9000", "http://store:9000"),
        ("?region=eu-west-1", None),
    ],
)
def test_the_options_of_an_address_become_the_streamers_environment(options, endpoint):
    env = stream_env(Folder(f"s3://bucket/a b/model{options}"))
    assert env.get("AWS_ENDPOINT_URL") == endpoint
    assert env.get("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING") == ("0" if endpoint else None)
    assert env.get("AWS_ENDPOINT_URL_S3") == endpoint
    region = "eu-west-1" if "region" in options else "us-east-1"
    assert env["AWS_REGION"] == env["AWS_DEFAULT_REGION"] == region
    assert stream_env(Folder("gs://bucket/model")) == {}


def test_a_store_that_the_environment_names_is_the_streamers_too(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://elsewhere")
    env = stream_env(Folder("s3://bucket/model?region=eu-west-1"))
    assert env["AWS_ENDPOINT_URL"] == env["AWS_ENDPOINT_URL_S3"] == "http://elsewhere"
    assert env["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "0"
    own = stream_env(Folder(f"s3://bucket/model?{HERE}"))
    assert own["AWS_ENDPOINT_URL"] == own["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:9000"


def test_an_engines_workers_on_other_nodes_get_it_too(monkeypatch):
    monkeypatch.setenv(PASSED_ON, "MINE")
    env = stream_env(Folder(f"s3://bucket/model?{HERE}"))
    assert set(env[PASSED_ON].split(",")) == {"MINE", *env} - {PASSED_ON}


def test_vllm_gets_the_plain_address_of_the_weights():
    arguments = stream_arguments(Folder(f"s3://bucket/a b/model?{HERE}"))
    assert arguments == {"load_format": "runai_streamer", "model_weights": "s3://bucket/a b/model"}


def test_only_weights_in_a_store_are_streamed(tmp_path):
    """What was trained from the model may be on disk."""
    assert streams(streamed("s3://bucket/model"), Folder("s3://bucket/out/sft/model"))
    assert not streams(streamed("s3://bucket/model"), Folder(str(tmp_path)))
    assert not streams(ModelConfig(name="a", model="m"), Folder("s3://bucket/model"))


# --- identity and copies -------------------------------------------------------------------------


def test_a_run_can_change_the_way_and_redoes_nothing(stored, folder, tmp_path, installed):
    """The keys are also those of the same files on disk."""
    ways = [one_source(stored, tmp_path, stream_weights=way) for way in (True, False)]
    ways.append(one_source(str(folder), tmp_path))
    jobs = [Chain(preflight(way), "generate").build()[-1].steps[-1] for way in ways]
    assert len({step.key for step in jobs}) == 1


def test_nodes_get_all_files_but_the_weights(stored, folder, tmp_path, installed, monkeypatch):
    monkeypatch.setenv("WRPO_CACHE", str(tmp_path / "cache"))
    settings = preflight(one_source(stored, tmp_path, stream_weights=True))
    (job,) = Chain(settings, "generate").build()[-1].jobs
    ((copied, version),) = job.loads.models
    copied.bring(version)  # as the shelf of a node does
    local = job.local()
    assert job.fingerprint == version
    files = {file.name for file in local.iterdir()}
    assert files == {file.name for file in folder.iterdir()} - {WEIGHTS}
    whole = Folder(stored).local(version)
    assert whole != local
    assert (whole / WEIGHTS).is_file()
    assert isinstance(copied, WithoutWeights)


def test_a_running_engine_is_given_no_other_weights_by_the_streamer(tmp_path, folder):
    """vLLM's reload_weights refuses it, so each model has engines of its own."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    for way, is_shared in (("runai_streamer", False), ("safetensors", True)):
        settings = one_source(str(folder), tmp_path)
        target = TargetConfig(name="t", model=str(folder), performance={"load_format": way})
        settings = settings.model_copy(update={"target": target})
        chain = Chain(settings, "sample", shares_engines=True)
        assert bool(chain._jobs._family(target)) is is_shared
        assert (
            hasattr(get_model_loader(LoadConfig(load_format=way)), "get_all_weights") is is_shared
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"engine": {"load_format": "auto"}}, "stream_weights: loads by runai_streamer; leave"),
        ({"performance": {"load_format": "safetensors"}}, "stream_weights: loads by runai_strea"),
        ({"endpoint": {"url": "http://h/v1"}}, "stream_weights belongs to a model on vLLM"),
        ({"engine": {"model_weights": "s3://b/m"}}, "engine.model_weights: the weights are those"),
    ],
)
def test_settings_that_do_not_go_together(more, reason):
    with pytest.raises(ValueError, match=reason):
        streamed("s3://bucket/model", **more)
    same = {"performance": {"load_format": "runai_streamer", "model_loader_extra_config": {}}}
    assert streamed("s3://bucket/model", **same).load_format == "runai_streamer"


def test_a_server_copies_its_models():
    tree = {"models": [{"name": "a", "model": "s3://bucket/model", "stream_weights": True}]}
    with pytest.raises(UserError, match="stream_weights: a served model is copied to its nodes"):
        serving(tree)


@pytest.mark.parametrize(
    ("model", "output", "reason"),
    [
        ("/models/a", "/out", "from s3:// and gs:// only, not from /models/a; put the model into"),
        ("hf://org/name@1234", "/out", "s3:// and gs:// only, not from hf://org/name@1234; put"),
        ("hdfs://host/a", "/out", "from s3:// and gs:// only, not from hdfs://host/a; put the"),
        ("s3://b/m?tls_verify_certificates=no", "/out", "no option tls_verify_certificates of a"),
        ("gs://b/m?endpoint_override=h", "/out", "has no option endpoint_override of a store; dr"),
        (
            "s3://anonymous@b/m",
            "/out",
            "signs its requests, which the address forbids .anonymous@.; give",
        ),
        (f"s3://b/m?{HERE}", "s3://c/out", "and s3://c/out names no store of its own; give its"),
    ],
)
def test_stores_that_the_streamer_cannot_read(model, output, reason, installed):
    with pytest.raises(UserError, match=reason) as told:
        check_loader("a", streamed(model), Folder(output))
    assert str(told.value).startswith("a: stream_weights: ")
    assert "leave stream_weights out" in str(told.value)
    check_loader("a", ModelConfig(name="a", model=model), Folder(output))


def test_stores_that_it_can_read(installed):
    for model, output in [
        ("s3://b/m?region=eu-west-1&allow_delayed_open=true", "s3://c/out"),
        (f"s3://b/m?{HERE}", f"s3://c/out?{HERE}"),
        (f"s3://b/m?{HERE}", "/out"),
        ("gs://b/m", "gs://c/out"),
    ]:
        check_loader("a", streamed(model), Folder(output))


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
@pytest.mark.parametrize("lacking", ["runai_model_streamer", "runai_model_streamer_{}"])
def test_a_missing_package_is_told_with_what_installs_it(scheme, extra, lacking, monkeypatch):
    name = lacking.format(extra)
    monkeypatch.setattr("importlib.util.find_spec", lambda given: None if given == name else given)
    with pytest.raises(UserError, match=rf"run pip install 'runai-model-streamer\[{extra}\]', or"):
        check_loader("a", streamed(f"{scheme}://b/m"), Folder("/out"))


def changed(folder: Path, to: Path, **values) -> Path:
    """A copy of a model whose config.json has other values; None drops one."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    found = json.loads((to / "config.json").read_text()) | values
    found = {name: value for name, value in found.items() if value is not None}
    (to / "config.json").write_text(json.dumps(found))
    return to


def in_store(folder: Path, bucket: str) -> str:
    address = bucket.replace("/run?", f"/models/{folder.parent.name}-{folder.name}?")
    Folder(address).upload(folder)
    return address


def test_weights_that_vllm_would_read_otherwise_from_a_copy(folder, stored, bucket, tmp_path):
    """Each is read well, or refused by itself, where vLLM has the files."""
    on_gpu = {"num_gpus": 1}
    cases = {
        "tied": ({"tie_word_embeddings": True}, "have an lm_head.weight, which its config.json t"),
        "untyped": ({"dtype": None}, "its config.json names no dtype; set `dtype` of the model, "),
        "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "of gptq weights vLLM reads f"),
    }
    for name, (values, reason) in cases.items():
        at = in_store(changed(folder, tmp_path / name, **values), bucket)
        with pytest.raises(UserError, match=f"a: stream_weights: .*{reason}"):
            check_streamed("a", streamed(at, actors=on_gpu))
        check_streamed("a", ModelConfig(name="a", model=at, actors=on_gpu))
        if name == "untyped":
            check_streamed("a", streamed(at, actors=on_gpu, dtype="bfloat16"))
            check_streamed("a", streamed(at))  # float32, as on every CPU
    check_streamed("a", streamed(stored))
    assert "lm_head.weight" in weight_stream.read_tensors(Folder(stored))
    tied = write_model(tmp_path / "without", tied=True)
    check_streamed("a", streamed(in_store(tied, bucket)))


def test_a_folder_with_other_files_than_the_weights(folder, bucket, tmp_path):
    """The streamer takes all safetensors files, and no others."""
    more = changed(folder, tmp_path / "more")
    (more / OTHERS).write_bytes((more / WEIGHTS).read_bytes())
    (more / "model.safetensors.index.json").write_text(
        json.dumps(
            {"weight_map": dict.fromkeys(weight_stream.read_tensors(Folder(str(folder))), WEIGHTS)}
        )
    )
    pickled = changed(folder, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "pytorch_model.bin")
    by_streamer = {"performance": {"load_format": "runai_streamer"}}
    for where, reason in ((more, f"also {OTHERS}, which"), (pickled, "pytorch_model.bin is none")):
        at = in_store(where, bucket)
        with pytest.raises(UserError, match=f"a: stream_weights: reads .*{reason}"):
            check_streamed("a", streamed(at))
        with pytest.raises(UserError, match=f"a: load_format: runai_streamer: reads .*{reason}"):
            check_streamed("a", ModelConfig(name="a", model=str(where), **by_streamer))
    check_streamed(
        "a", ModelConfig(name="a", model=in_store(more, bucket), **by_streamer)
    )  # copied
    check_streamed("a", ModelConfig(name="a", model=str(folder), **by_streamer))


def test_the_preflight_of_a_run_tells_it(stored, folder, bucket, tmp_path, installed):
    """Of every model on vLLM, before any work."""
    tied = in_store(changed(folder, tmp_path / "tied", tie_word_embeddings=True), bucket)
    for model, reason in (
        (str(folder), "a: stream_weights: vLLM reads weights from s3:// and gs:// only"),
        (tied, "a: stream_weights: its weights have an lm_head.weight"),
    ):
        with pytest.raises(UserError, match=reason):
            preflight(one_source(model, tmp_path, stream_weights=True))
        judging = EvaluateConfig(judge=streamed(model))
        with pytest.raises(UserError, match=reason):
            preflight(one_source(stored, tmp_path).model_copy(update={"evaluate": judging}))
    preflight(one_source(stored, tmp_path, stream_weights=True))
