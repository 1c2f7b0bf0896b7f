"""Site files: strict, every problem at once, never a secret."""

import os
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.resources import resource
from launch.slurm.site import Site, load_site

SECRETS = [
    *(
        "MYTOKEN",
        "DB_PWD",
        "GITHUB_PAT",
        "WANDB_API_KEY",
        "ENCRYPTION_KEY",
        "password",
        "AWS_SECRET_ACCESS_KEY",
    ),
    *("SMTP_PASS", "my_passphrase", "REGISTRY_AUTH"),
]
TOKENS = [
    *(
        "ghp_abcdefgh",
        "github_pat_11ABC",
        "sk-abcdefgh",
        "x=sk-ant-api03",
        "AKIAIOSFODNN7EXAMPLE",
        "glpat-abcdef",
    ),
    *("eyJhbGciOi.eyJzdWIiOi.x", "--opt hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "-----BEGIN RSA PRIVATE KEY"),
    "postgres://me:word@host/db",
]


def test_the_example_says_the_defaults() -> None:
    assert load_site(resource("slurm", "site.example.yaml"), {}) == Site()


def test_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("partition: gpu\ntime: '1:00:00'\ncontainer: {runtime: pyxis, image: a}\n")
    site = load_site(file, {"partition": "long", "container.image": "b", "qos": None})
    assert (site.partition, site.time, site.container.image, site.qos) == ("long", "1:00:00", "b", None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("partion: gpu", "partion: unknown key; did you mean partition?"),
        ("time: 90", "time: not a valid value (got 90); give a time limit"),  # YAML reads 1:30 as 90
        ("time: soon", "in quotes in a file"),
        ('time: "1\\r"', "time: not a valid value"),
        (
            "environment: {HF_TOKEN: hf_x}",
            "environment.HF_TOKEN: would write a secret into every job's script",
        ),
        *(
            (f"environment: {{{name}: word}}", f"environment.{name}: would write a secret")
            for name in SECRETS
        ),
        *(
            (f"environment: {{NAME: '{value}'}}", "environment.NAME: would write a secret")
            for value in TOKENS
        ),
        ("options: ['--comment=ghp_abcdef']", "options: --comment would write a secret"),
        ("options: ['--plugin-env=A=1,DB_PWD=word']", "options: --plugin-env would write a secret"),
        (
            "container: {runtime: pyxis, image: 'docker://me:word@registry/a'}",
            "container.image: would write a secret",
        ),
        (
            "environment: {HTTPS_PROXY: 'http://me:word@proxy:80'}",
            "environment.HTTPS_PROXY: would write a secret",
        ),
        ("environment: {SOME_NAME: hf_abc}", "environment.SOME_NAME: would write a secret"),
        (
            "options: ['--export=ALL,NAME=x']",
            "options: --export is not for a site file: it could hold secrets",
        ),
        ("options: ['--array=1-4']", "options: --array is not for a site file: it would start one run many"),
        # As getopt_long reads them: beginnings that no other option has.
        ("options: ['--arr=1-4']", "options: --arr is not for a site file: it would start one run many"),
        ("options: ['--export-f=a']", "options: --export-f is not for a site file: it could hold secrets"),
        (
            "options: ['--wra=true']",
            "options: --wra is not for a site file: it takes the place of the script",
        ),
        (
            "options: ['--exp=ALL']",
            "options: --exp is not for a site file: it may mean --export, --export-file",
        ),
        ("options: ['--sig=B:USR1@9']", "options: --sig is not for a site file: give the key signal_lead"),
        (
            "options: ['--cpus-per-t=3']",
            "options: --cpus-per-t is not for a site file: give the key cpus_per_pro",
        ),
        ("environment: {'A B': x}", "environment.'A B': not a variable's name"),
        ("options: [exclusive]", "options: 'exclusive' is no option of sbatch"),
        ("container: {image: x}", "container.runtime: none although there is an image"),
        ("container: {runtime: apptainer}", "container.image: missing"),
        ("signal_lead: 0", "signal_lead: "),
        ("- a", "is not a mapping"),
        ("a: [", "is not valid YAML"),
        ("partition: a\npartition: b", "key 'partition' appears twice"),
        ("environment: {A: x, A: y}", "key 'A' appears twice"),
        ("partition: " + "[" * 3000, "nested too deeply"),
        ("partition: &a [*a]", "is inside of what it stands for"),
        ("cpus_per_process: 1" + "0" * 5000, "an integer of more than 4,300 digits"),
        ("cpus_per_process: 2026-99-99", "cpus_per_process: must be a valid integer"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
            "more than 50,000 values",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(file, {})
    assert problem in str(caught.value)
    assert str(file) in str(caught.value)


def test_words_that_only_look_like_secrets_are_no_secrets(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "environment: {TOKENIZERS_PARALLELISM: 'false', MAX_TOKENS: '9', NCCL_IB_HCA: 'mlx5_0:1', NCCL_IB_PKEY: '1',\n"
        " HF_TOKEN_PATH: /home/me/token, SSH_AUTH_SOCK: /run/agent, HF_HUB_DISABLE_IMPLICIT_TOKEN: '1', PWD: /work,\n"
        " HF_HOME: /data/hf_cache/sk-learn, GIT: 'ssh://git@host/a', ARROW: 'disk-abcdefgh'}\n"
        "options: [--exclusive, '--gres=nvme:1', '--mem-per-cpu=4G', '--wckey=a', '--exclusi=user', '--plugin=a']\n"
        "partition: hf_gpu\naccount: sk-biophysics\npython: /data/ghs_lab/venv/bin/python\n"
        f"container: {{runtime: apptainer, image: 'docker://ubuntu:24.04@sha256:{'0f' * 32}'}}"
    )
    site = load_site(file, {})
    assert (len(site.environment), len(site.options)) == (11, 6)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "site.yaml")
    with pytest.raises(ConfigError, match=r"^--site: .*site\.yaml: is no plain file"):
        load_site(tmp_path / "site.yaml", {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--site: .*cannot be read"):
        load_site(Path("~no-such-user/site.yaml"), {})
    with pytest.raises(ConfigError, match=r"^--site: .*nothing\.yaml cannot be read"):
        load_site(tmp_path / "nothing.yaml", {})
