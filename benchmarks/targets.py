"""The servers that are measured. Each is a context manager: started inside, stopped at the end.

All run on the target core with files of their own in a temporary folder, and forward to the same mock.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from benchmarks.kit import GENSTACK, BenchmarkError, Cores, Target, pinned, stop, wait_until

HEADGATE = Path(sys.executable).parent / "headgate"
ACCOUNT = "benchmark"
NATIVE = "headgate"
"""The gateway on its native way: clients and upstream both speak OpenAI's completions."""

NGINX_CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000;
  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://mock;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;  # streams pass at once, as they do through the gateway
    }}
  }}
}}
"""

HEADGATE_CONFIG = """
[providers.mock]
kind = "openai"
base_url = "http://127.0.0.1:{upstream}/v1"
api_key_env = "BENCHMARK_UPSTREAM_KEY"

[providers.messages]
kind = "anthropic"
base_url = "http://127.0.0.1:{upstream}/v1"
api_key_env = "BENCHMARK_UPSTREAM_KEY"

[[models]]
name = "mock-model"
provider = "mock"
mode = "completion"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
output_price = "1.50"

[[models]]
name = "mock-chat"
provider = "mock"
mode = "chat"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
output_price = "1.50"

[[models]]
name = "mock-messages"
provider = "messages"
mode = "chat"
context_window = 8192
max_output_tokens = 4096
input_price = "0.50"
output_price = "1.50"
"""

LITELLM_CONFIG = """
model_list:
  - model_name: mock-model
    litellm_params:
      model: text-completion-openai/mock-model
      api_base: http://127.0.0.1:{upstream}/v1
      api_key: none
"""


@contextmanager
def nginx(folder: Path, upstream: int, cores: Cores) -> Iterator[Target]:
    """nginx as a plain proxy with kept-alive upstream connections: the least a hop can cost."""
    port = free_port()
    config = folder / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(folder=folder, upstream=upstream, port=port), encoding="utf-8")
    # Debian keeps nginx in /usr/sbin, which is not on every user's path.
    command = [cast(str, find_nginx()), "-p", str(folder), "-c", str(config), "-e", "stderr"]
    with _running(command, folder / "nginx.log", cores) as process:
        start_s = wait_until(lambda: _accepts(port), process, folder / "nginx.log", 10)
        yield Target(name="nginx", pid=process.pid, port=port, start_s=start_s)


@contextmanager
def headgate(folder: Path, upstream: int, cores: Cores) -> Iterator[Target]:
    """The gateway as users start it: authentication, prices, and the ledger on disk. Asked for the model of the
    mock's completions; `mapped` are the other ways to ask it."""
    with configured_headgate(folder, HEADGATE_CONFIG.format(upstream=upstream), cores) as target:
        yield target


def mapped(folder: Path, gateway: Target) -> tuple[Target, Target]:
    """The same gateway on the ways where what the client speaks is not what the upstream speaks."""
    token = headgate_json(folder, "tokens", "create", "--account", ACCOUNT, "--ttl", "6h")["token"]
    return (
        replace(gateway, name="openai → chat", model="mock-chat"),
        replace(gateway, name="genstack → anthropic", model="mock-messages", key=token, dialect=GENSTACK),
    )


@contextmanager
def configured_headgate(folder: Path, settings: str, cores: Cores) -> Iterator[Target]:
    """The gateway with this headgate.toml, the account `ACCOUNT` and a key of it; `folder` takes its data."""
    if not HEADGATE.exists():
        raise BenchmarkError(f"{HEADGATE} does not exist; run this from the project's environment")
    config, log, out = folder / "headgate.toml", folder / "headgate.log", folder / "headgate.out"
    config.write_text(settings, encoding="utf-8")
    headgate_json(folder, "accounts", "create", ACCOUNT, "--credit", "100000")
    key = headgate_json(folder, "keys", "create", "--account", ACCOUNT)["key"]
    command = [str(HEADGATE), "serve", "--config", str(config), "--port", "0"]
    with _running(command, log, cores, out=out, env=_headgate_environment(folder)) as process:
        start_s = wait_until(lambda: "ready http" in out.read_text(encoding="utf-8"), process, log, 30)
        address = out.read_text(encoding="utf-8").rsplit("ready ", 1)[1].split()[0]
        port = int(address.rsplit(":", 1)[1])
        yield Target(name=NATIVE, pid=process.pid, port=port, start_s=start_s, key=key)


@contextmanager
def litellm(folder: Path, upstream: int, cores: Cores) -> Iterator[Target]:
    """LiteLLM's proxy without key or database, where somebody has installed it."""
    port = free_port()
    config, log = folder / "litellm.yaml", folder / "litellm.log"
    config.write_text(LITELLM_CONFIG.format(upstream=upstream), encoding="utf-8")
    command = ["litellm", "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with _running(command, log, cores) as process:
        start_s = wait_until(lambda: _accepts(port), process, log, 120)
        yield Target(name="litellm", pid=process.pid, port=port, start_s=start_s)


def find_nginx() -> str | None:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def headgate_json(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a command of the gateway's own CLI on the benchmark's data folder; returns its JSON document."""
    command = [str(HEADGATE), *arguments, "--json"]
    finished = subprocess.run(
        command,
        env=_headgate_environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if finished.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {finished.stderr or finished.stdout}")
    return cast(dict[str, Any], msgspec.json.decode(finished.stdout))


def check_ledger(folder: Path, answered: int) -> None:
    """Prove that the ledger was on: every answer is in it, and it adds up."""
    checked = headgate_json(folder, "ledger", "check")
    if not checked["ok"] or checked["open_holds"] or checked["transfers"] < answered:
        raise BenchmarkError(f"the ledger does not add up after {answered} answers: {checked}")
    print(f"ledger: {checked['transfers']:,} transfers, sums to zero, no open holds")


def free_port() -> int:
    """A port nobody listens on, for servers that cannot be given port 0."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _headgate_environment(folder: Path) -> dict[str, str]:
    # Settings of whoever runs the benchmark must not leak into it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
    return inherited | {"HEADGATE_DATA_DIR": str(folder / "data"), "BENCHMARK_UPSTREAM_KEY": "none"}


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _running(
    command: list[str], log: Path, cores: Cores, *, out: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command on the target core, its output in files; stopped at the end."""
    with log.open("wb") as errors, (out or log).open("ab") as output, pinned(cores.target):
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=log.parent, env=env, text=True)
    try:
        yield process
    finally:
        stop(process)
