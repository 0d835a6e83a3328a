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


PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA0\n-----END RSA PRIVATE KEY-----"
HUB = "hf_AbCdEfGhIjKlMnOpQrStUvWx"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        *((f"{name}={CANARY} x", f"{name}=... x") for name in (
            "TOKEN", "SECRET", "KEY", "DB_PASS", "CREDENTIALS", "hf_token", "access_token",
            "client_secret", "AccountKey", "--api-key", "--token", "SharedAccessKey", "apiKey",
        )),
        *((f'{{"{name}": "{CANARY}", "a": 1}}', f'{{"{name}": "...", "a": 1}}') for name in (
            "token", "hf_token", "accessToken", "secret", "TOKEN", "credentials", "password",
        )),
        *((f"{name}: {CANARY}\nx", f"{name}: ...\nx") for name in (
            "x-goog-api-key", "x-amz-security-token", "X-Auth-Token", "api-key", "PRIVATE-TOKEN",
            "TOKEN", "token", "DB_PASS", "password",
        )),
        ("curl -H 'X-Api-Key: plugh' x", "curl -H 'X-Api-Key: ...' x"),
        (f"wrpo x --token {CANARY} --api-key {CANARY} y", "wrpo x --token ... --api-key ... y"),
        (f"['hf', '--token', '{CANARY}', 'y']", "['hf', '--token', '...', 'y']"),
        ("Cookie: session=abc; user=plugh\nx", "Cookie: ...\nx"),
        ("{'Cookie': 'session=abc; b=c', 'A': 1}", "{'Cookie': '...', 'A': 1}"),
        ("AccountName=a;AccountKey=Ab/+c==;EndpointSuffix=b",
         "AccountName=a;AccountKey=...;EndpointSuffix=b"),
        (f'Bearer "{CANARY}" x', 'Bearer "..." x'),
        (f'Authorization: Bearer "{CANARY}" x', 'Authorization: ..." x'),
        ("PASSWORD=p@ss,word9 x", "PASSWORD=... x"),
        ("DB_PASS=abc,def9 x", "DB_PASS=... x"),
        ("PASSWORD=p(a)s's\\word9 x", "PASSWORD=... x"),
        ("f(password=p@ss, user=1)", "f(password=..., user=1)"),
        ('password="p\'q\\"r" x', 'password="..." x'),
        ("os.environ['HF_TOKEN'] = 'Xyzzy0Plugh'", "os.environ['HF_TOKEN'] = '...'"),
        (f"a {PEM} b", f"a {PEM[:31]}...{PEM[-29:]} b"),
        (repr(PEM), f"'{PEM[:31]}...{PEM[-29:]}'"),
        (PEM[:50], "-----BEGIN RSA PRIVATE KEY-----..."),
        *((f"{before}{HUB} x", f"{before}... x") for before in (
            "-", "key-", "\x1b[31m", "\x1b[1;31m", "\x1b[0m", "/", ",", "user:",
        )),
        (f"key-{JWT}", "key-..."),
        *((f"of {form} x", "of ... x") for form in (
            "hf_oauth_eyJhbGciOi.Ab12Cd34Ef56", f"npm_{'aB3' * 12}", f"pypi-AgEIc{'aB3-' * 12}",
            f"dckr_pat_{'aB3' * 9}", "sk-ant-api03-Ab12Cd34Ef56Gh78-x", "sk-or-v1-0123456789abcdef",
            "xoxb-123456789012-abcdefghijkl",
        )),
    ],
)  # fmt: skip
def test_every_kind_of_credential_is_hidden_up_to_its_end(text: str, left: str):
    assert redact(text) == left
    assert redact(left) == left


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
        "if API_KEY == 'abc': pass",
        "if password == 'abc' and token != 'Ab12Cd34'",
        "Authorization: required. Please",
        "What is authorization: it is",
        "EOS_TOKEN: 151643, EOS_TOKEN=151643, EOS_TOKEN='</s>'",
        "SORT_KEY=name",
        "Basic Authentication, Basic Authorization/Authentication",
        "sk-learn-contrib-Package-name-V2",
        "def f(api_key: str = None, password: Optional[str], token: str)",
        '{"token": "understanding", "logprob": -0.5, "token": "<|endoftext|>"}',
        "tiktoken==0.12.0, tiktoken=0.12.0, tokens: 12345678, n_tokens=1234567890",
        "pass --token to the command, or --api-key. The cookie: it is",
        "time per token: 0.12ms/token",
        "get a token: https://huggingface.co/settings/tokens",
        "wrpo serve --new-key client; stop_token='User:'; the secret: nobody knows",
        "-----BEGIN CERTIFICATE-----\nMIIEpAIBAAKCAQEA0\n-----END CERTIFICATE-----",
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
