"""What `import headgate` and the command's entry cost: nothing heavy until it is needed."""

import json
import subprocess
import sys

import pytest

HEAVY = ("sqlalchemy", "alembic", "aiohttp", "starlette", "uvicorn", "typer", "xllamacpp", "cryptography")


def modules_after(statement: str) -> set[str]:
    """The modules a fresh interpreter has after a statement."""
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(ran.stdout))


@pytest.mark.parametrize("statement", ["import headgate", "import headgate.__main__"])
def test_importing_the_package_imports_nothing_heavy(statement: str) -> None:
    modules = modules_after(statement)
    assert "headgate" in modules
    assert modules.isdisjoint(HEAVY)


def test_the_core_needs_msgspec_alone() -> None:
    modules = modules_after("import headgate.core.ports, headgate.core.completion, headgate.core.accounts")
    assert modules.isdisjoint({*HEAVY, "structlog", "jwt", "prometheus_client", "httptools"})
