"""The table of docs/works_with.md says what the tests say."""

from tests.helpers import works_with
from tests.helpers.architectures import ARCHITECTURES


def test_the_page_is_up_to_date():
    block = works_with.block_in(works_with.PAGE.read_text(encoding="utf-8"))
    assert block == works_with.table(), "run: python -m tests.helpers.works_with"


def test_the_block_is_written_between_the_markers():
    text = f"before\n{works_with.START}\nold\n{works_with.END}\nafter\n"
    new = works_with.updated(text)
    assert works_with.block_in(new) == works_with.table()
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert works_with.updated(new) == new
    assert works_with.block_in("no markers") is None


def test_every_architecture_has_a_row():
    assert len(works_with.table().splitlines()) == len(ARCHITECTURES) + 2
    assert len(ARCHITECTURES) >= 20
    assert {a.name.split("/")[0] for a in ARCHITECTURES} == {"torchvision", "timm", "transformers"}
