"""Credentials in errors and logs are hidden, by their names, their forms and the environment."""

from __future__ import annotations

import json

import pytest

from wrpo_ray.text.addresses import redact, without_secrets

CANARY = "Xyzzy0Plugh-8f3a"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4eXp6eSJ9.c2lnbmF0dXJlLXBhcnQ"
HEADERS = {"Accept": "*/*", "Authorization": f"Bearer {CANARY}", "X-Api-Key": CANARY}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"401 for Bearer {CANARY}: denied", "401 for Bearer ...: denied"),
        ("curl -H 'Authorization: Bearer abc' failed", "curl -H 'Authorization: ...' failed"),
        (f"Authorization: Token {CANARY} and more", "Authorization: ... and more"),
        (f"authorization={CANARY}", "authorization=..."),
        ("Proxy-Authorization: Basic dTpw no", "Proxy-Authorization: ... no"),
        (
            f"Authorization: AWS4-HMAC-SHA256 Credential=AB/s3, Signature={CANARY}",
            "Authorization: ...",
        ),
        (f'Authorization: Digest username="u", response="{CANARY}" no', "Authorization: ... no"),
        ("Basic dXNlcjpwYXNzd29yZA== is wrong", "Basic ... is wrong"),
        ("token hf_AbCdEfGhIjKlMnOpQrStUvWx is invalid", "token ... is invalid"),
        ("Wrong key sk-proj-Ab12Cd34Ef56Gh78.", "Wrong key ...."),
        (f"key wrpo-{'aB3_-' * 8}xyz refused", "key ... refused"),
        (f"decoding {JWT} failed", "decoding ... failed"),
        (r"b'line\nhf_AbCdEfGhIjKlMnOpQrStUvWx'", r"b'line\n...'"),
        (f"HF_TOKEN={CANARY} wrpo fuse", "HF_TOKEN=... wrpo fuse"),
        (f"HF_TOKEN = '{CANARY}'", "HF_TOKEN = '...'"),
        (f"{{'MY_SECRET': '{CANARY} x', 'A': 1}}", "{'MY_SECRET': '...', 'A': 1}"),
        (f"AWS_SECRET_ACCESS_KEY: {CANARY}", "AWS_SECRET_ACCESS_KEY: ..."),
        ("REDIS_PASSWORD=hunter2;DB=1 {}", "REDIS_PASSWORD=...;DB=1 {}"),
        ("Client(api_key='plugh', base_url='x')", "Client(api_key='...', base_url='x')"),
        ('{"openai_api_key": "plugh"}', '{"openai_api_key": "..."}'),
        ("connect(user='a', password='plugh')", "connect(user='a', password='...')"),
    ],
)  # fmt: skip
def test_a_credential_is_hidden_and_the_text_around_it_is_kept(text: str, left: str):
    assert redact(text) == left


@pytest.mark.parametrize("form", [str, repr, json.dumps, lambda h: json.dumps(json.dumps(h))])
def test_headers_are_hidden_however_they_are_printed(form):
    assert CANARY not in redact(f"request failed: {form(HEADERS)}")


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=5 and 12 token ids",
        "the tokenizer has no pad_token='<pad>', eos_token_id=2",
        "a Bearer token is missing; bearer authentication (RFC 6750)",
        "OPENAI_API_KEY: is not set; HF_TOKEN is missing: set it",
        "api_key=None, key_env=OPENAI_API_KEY",
        "no room for key=5 of sort_key, monkey=1",
        "password: required",
        "hf_hub_download and hf_transfer of sk-learn-contrib-extra-packages",
        "authorization of the cluster failed",
        "Basic authentication needs a password",
        "RayJob/wrpo-raycluster-generate-1gpu-worker-abcde-fghij-klmno",
    ],
)
def test_words_that_are_no_credentials_are_kept(text: str):
    assert redact(text) == text


def test_values_of_the_environment_are_hidden_wherever_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_OWN_KEY", "correct horse battery")
    monkeypatch.setenv("OTHER_KEY", "five")
    monkeypatch.setenv("OTHER_PLACE", "the long name")
    text = "of 'correct horse battery': high five, the long name"
    assert redact(text) == "of '...': high five, the long name"


def test_what_is_kept_of_a_config_does_not_depend_on_the_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("MY_OWN_KEY", "/cache/models")
    assert without_secrets({"model": "/cache/models/a"}) == {"model": "/cache/models/a"}
