"""What the snippets of single pages need."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.endswith("[docs/peft-quantised.md]"):  # PEFT and torchao call what is deprecated
            item.add_marker(pytest.mark.filterwarnings("ignore"))
