"""Claims about what counts as a credential: every kind in use, in values, names, URLs and files; no path, name or hash."""

import time

import pytest

from raytune.credentials import find_secret, find_secret_value, redacted

LETTERS = "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8cX0fR5uL7iO"
HEX = "3f9a1c7e5b2d8046"
AWS_KEY = "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq" + "/K1SZFPTOtr/KBHBeksoGMGw=="

SECRETS = {
    "hf": "hf_" + LETTERS[:34],
    "hf short": "hf_" + "CANARYcanary0123456789",
    "hf in a path": "/data/hf_" + LETTERS[:34] + "/x",
    "github": "ghp_" + LETTERS[:36],
    "github app": "gho_" + LETTERS[:36],
    "github fine": "github_pat_" + "11" + LETTERS + "_" + LETTERS[:20],
    "gitlab": "glpat-" + LETTERS[:20],
    "google": "AIza" + "Sy" + LETTERS[:33],
    "google oauth": "ya29." + "a0Af_" + LETTERS,
    "slack bot": "xoxb-" + "2345678901-2345678901-" + LETTERS[:24],
    "slack user": "xoxp-" + "2345678901-" + LETTERS[:24],
    "openai": "sk-" + LETTERS[:20] + "T3Blbk" + "FJ" + LETTERS[:20],
    "openai project": "sk-proj-" + LETTERS + "_" + LETTERS,
    "anthropic": "sk-ant-" + "api03-" + LETTERS + "-" + LETTERS,
    "aws id": "AKIA" + "IOSFODNN7EXAMPLE",
    "aws temporary": "ASIA" + "IOSFODNN7EXAMPLE",
    "aws in text": "AWS_SECRET_ACCESS_KEY=" + AWS_KEY,
    "aws in json": '"SecretAccessKey": "' + AWS_KEY + '"',
    "azure": "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=" + AZURE_KEY,
    "azure bare": AZURE_KEY,
    "azure sas": "https://a.blob.core.windows.net/c?sv=2022-11-02&sig=" + "aB3dE5gH7jK9mN1pQ2sT4vW6yZ8%3D",
    "gcp": '{"type": "service_' + 'account", "project_id": "p"}',
    "pem": "-----BEGIN " + "PRIVATE KEY-----\nMIIE",
    "pem in json": '"private_key": "-----BEGIN RSA ' + "PRIVATE KEY-----\\nMIIE",
    "openssh": "-----BEGIN OPENSSH " + "PRIVATE KEY-----\n",
    "pgp": "-----BEGIN PGP " + "PRIVATE KEY BLOCK-----\n",
    "wandb new": "wandb_v1_" + LETTERS,
    "wandb env": "export WANDB_API_KEY=" + HEX + HEX + HEX[:8],
    "wandb code": 'wandb.login(key="' + HEX + HEX + HEX[:8] + '")',
    "netrc": "machine api.wandb.ai login user password " + "hunter2",
    "jwt": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + LETTERS,
    "npm": "npm_" + LETTERS[:36],
    "npmrc": "//registry.example.com/:_authToken=" + LETTERS,
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + LETTERS * 2,
    "stripe": "sk_live_" + LETTERS[:24],
    "sendgrid": "SG." + LETTERS[:22] + "." + LETTERS + "abcde",
    "databricks": "dapi" + HEX + HEX,
    "telegram": "123456789:AA" + LETTERS[:33],
    "groq": "gsk_" + LETTERS + LETTERS,
    "docker": "dckr_pat_" + LETTERS,
    "docker login": '{"auths": {"r": {"auth": "' + "dXNlcjpwYXNz" + 'd29yZDEyMw=="}}}',
    "vault": "hvs." + LETTERS,
    "bearer": "Authorization: Bearer " + LETTERS,
    "url": "https://user:pw@" + "host/x",
    "url without a user": "redis://:pw@" + "host:6379",
    "url with keys": "s3://AKIA" + "X:SECRET@" + "bucket/runs",
    "url with a slash in the password": "s3://key:" + AWS_KEY + "@bucket",
    "url with a token": "https://oauth2token@" + "github.com/a/b",
    "url with a parameter": "https://host/rows.jsonl?access_token=" + "abcdef",
    "signed url": "https://b.s3.amazonaws.com/k?X-Amz-Signature=" + HEX,
    "assignment": "password: " + "x9Kq2LmZ7Rt4Vb8N",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_credential_is_found_and_never_shown(kind: str):
    text = f"before {SECRETS[kind]}\n"
    found = find_secret(text)
    assert found is not None
    hidden = text[found.start : found.stop].removeprefix(found.shown)
    assert not hidden or (hidden not in str(found) and hidden not in redacted(text))


ORDINARY = """
demo:train rows.jsonl ./data/train.jsonl /data/hf_models/llama-3 hf_baseline hf_baseline_run_1 runs/hf_llama_finetune_v1
hf://datasets/a/b meta-llama/Llama-3.1-8B-Instruct Qwen/Qwen2.5-0.5B-Instruct TheBloke/Llama-2-7B-Chat-GPTQ
sk-slovak-language-corpus-v2 task-1 risk-averse-agents-evaluation-long 0123456789abcdef0123456789abcdef01234567
e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg== s3://bucket/runs
gs://bucket/a/b abfs://container@account.dfs.core.windows.net/path abfss://container@account.dfs.core.windows.net
http://127.0.0.1:8265 http://host:8080/x@y ray://head:10001 file:///data/runs git@github.com:a/b https://git@github.com/a/b
hdfs://name:8020/x registry.example.com/team/raytune@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
me@gateway.example.com ami-0abcdef1234567890 sg-0a1b2c3d4e5f60718 arn:aws:iam::123456789012:role/raytune
subnet-0123456789abcdef0 p5.48xlarge model.layers.0.self_attn.q_proj Data/Train/Corpus/English/Files/Alpha12 AKIA_model
ASIAPACIFIC wandb_project wandb eyJson 3f2504e0-4f89-11d3-9a0c-0305e82c3301 2026-01-01T00:00:00 203.0.113.7/32
https://example.com/rows.jsonl?version=2&token_count=5 data/train-00000-of-00001-abcdef0123456789.parquet adapter.rank >= 16
2 * adapter.rank AIzanami npm_package_config_value pypi-mirror data/Mixed-Data_2024.v2/train_sharded_00001_of_00064.jsonl.zst
"""


@pytest.mark.parametrize("value", [value for value in ORDINARY.split() if len(value) > 2])
def test_paths_names_addresses_and_hashes_are_no_credentials(value: str):
    assert find_secret_value("model.revision", value) is None


CODE = """
token = os.environ["HF_TOKEN"]; pad_token: "<|endoftext|>"; tokens_per_s = model.num_tokens_per_second_of_rank0
api_key=os.getenv("OPENAI_API_KEY"), password=getpass.getpass("password: ")
url = f"https://{user}:{password}@host/path?token={token}"  # or https://$USER:$PASS@host
key = tokenizer.convert_tokens_to_ids; token_file: ~/.ray/auth_token; the key is model.layers.11.mlp
kubectl create secret generic raytune-token --from-file=auth_token; bearer tokens; `basic authentication`
"""


@pytest.mark.parametrize("line", CODE.strip().splitlines())
def test_program_text_that_speaks_of_credentials_holds_none(line: str):
    assert find_secret(line) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", AWS_KEY),
        ("anything", AWS_KEY),
        ("WANDB_API_KEY", HEX + HEX + HEX[:8]),
        ("DB_PASSWORD", "x9Kq2LmZ7Rt4Vb8N"),
        ("DB_PASSWORD", "/x9Kq2LmZ7Rt4Vb8N/"),
        ("hf_" + LETTERS[:34], "1"),
    ],
)
def test_a_name_tells_that_its_value_is_a_credential(name: str, value: str):
    assert find_secret_value(name, value) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.revision", HEX + HEX + HEX[:8]),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("WANDB_NAME", "llama3-8b-r16-a32-v2"),
        ("WANDB_RUN_ID", "0123456789abcdef0123456789abcdef"),
        ("tokenizer_revision", "3f2a9c1b7d5e8f0a6b4c2d1e9f8a7b6c5d4e3f2a"),
        ("tokens_file", "/data/x1b2/c3d4/e5f6"),
        ("name", "xai-attribution-study-of-llama-3-models"),
        ("name", "wandb_llamafinetuningexperiment"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/google/key-2.json"),
        ("ssh_key", "/tmp/rto8fx6y82/key"),  # in all, letters and digits take turns as in one drawn at random
        ("ssh_key", "~/.ssh/n0d3s-k8s-2b/id1"),
        ("provider.token_file", "~/.ray/auth_token"),
        ("RAY_AUTH_MODE", "token"),
        ("NCCL_DEBUG", ""),
    ],
)
def test_a_name_alone_makes_no_credential(name: str, value: str):
    assert find_secret_value(name, value) is None


def test_a_large_file_is_searched_in_moments():
    text = "\n".join(f'{{"messages": [{{"role": "user", "content": "What is {i} times 7, and why?"}}]}}' for i in range(100_000))
    began = time.process_time()
    assert find_secret(text) is None
    # 0.6 s measured for 8 MB; a pattern that looks back over the text at every place takes minutes.
    assert time.process_time() - began < 10, f"{len(text)} bytes"
