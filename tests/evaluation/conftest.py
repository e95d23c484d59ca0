"""The demo model behind a real gateway, and beside it what its file says by itself."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from tests.evaluation.vocabulary import Vocabulary
from tests.support.house import House, open_house
from tests.support.reference import Reference

from headgate.config import demo_model_path

CONFIG = """
[server]
open_tokenizer = true
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with open_house(CONFIG, tmp_path_factory.mktemp("evaluation")) as house:
        yield house


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference(demo_model_path())


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(demo_model_path())
